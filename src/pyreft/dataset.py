"""The original's module of this name; the code is in `pyreft.data` and `pyreft.compat`."""

from .compat import get_intervention_locations, parse_positions
from .data.dataset import ReftDataset, ReftRawDataset
from .data.instructions import ReftGenerationDataset, ReftPreferenceDataset, ReftSupervisedDataset
from .data.reward import ReftRewardCollator, ReftRewardDataset
from .data.supervised import IGNORED as IGNORE_INDEX
from .data.supervised import (
    ReftDataCollator,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)

__all__ = [
    "IGNORE_INDEX",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "get_intervention_locations",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "parse_positions",
]
