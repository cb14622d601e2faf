"""The original's module of this name; the code is in `pyreft.data` and `pyreft.original`."""

from .data.supervised import ReftDataCollator
from .original.data_modules import (
    make_last_position_supervised_chat_data_module,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)
from .original.datasets import ReftDataset, ReftRawDataset
from .original.instructions import (
    ReftClassificationDataset,
    ReftGenerationDataset,
    ReftPreferenceDataset,
    ReftSupervisedDataset,
    no_header_prompt_template,
    prompt_input,
    prompt_no_input,
)
from .original.locations import get_intervention_locations, parse_positions
from .original.reward import ReftRewardCollator, ReftRewardDataset
from .positions import IGNORED as IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "ReftClassificationDataset",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "get_intervention_locations",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "no_header_prompt_template",
    "parse_positions",
    "prompt_input",
    "prompt_no_input",
]
