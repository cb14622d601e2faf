"""The original's module of this name; the code is in `pyreft.data` and `pyreft.original.locations`."""

from .data.supervised import IGNORED as IGNORE_INDEX
from .data.supervised import ReftDataCollator
from .original.data_modules import (
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)
from .original.datasets import ReftDataset, ReftRawDataset
from .original.instructions import ReftGenerationDataset, ReftPreferenceDataset, ReftSupervisedDataset
from .original.locations import get_intervention_locations, parse_positions
from .original.reward import ReftRewardCollator, ReftRewardDataset

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
