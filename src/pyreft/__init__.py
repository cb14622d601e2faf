"""Representation finetuning (ReFT): learn small edits of the hidden states of a frozen Hugging Face model.

Importing this package makes PEFT know the method: any PEFT, transformers or TRL entry point takes a `ReftConfig`.
What trains and reads data is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peft import TaskType

from .errors import ReftError
from .interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .model import ReftModel, get_reft_model
from .original.locations import get_intervention_locations, parse_positions
from .steering import diff_mean
from .tuner.config import ReftConfig, register_with_peft
from .tuner.tuner import ReftTuner

if TYPE_CHECKING:
    from .data.supervised import ReftDataCollator
    from .original.data_modules import (
        make_last_position_supervised_data_module,
        make_multiple_position_supervised_data_module,
    )
    from .original.datasets import ReftDataset, ReftRawDataset
    from .original.instructions import ReftGenerationDataset, ReftPreferenceDataset, ReftSupervisedDataset
    from .original.reward import ReftRewardCollator, ReftRewardDataset
    from .training.trainer import (
        ReftTrainer,
        ReftTrainerForCausalLM,
        ReftTrainerForCausalLMDistributed,
        ReftTrainerForSequenceClassification,
    )

__version__ = "0.2.0.dev0"

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "ReftConfig",
    "ReftDataCollator",
    "ReftDataset",
    "ReftError",
    "ReftGenerationDataset",
    "ReftModel",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "TaskType",
    "diff_mean",
    "get_intervention_locations",
    "get_reft_model",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "parse_positions",
]

_LAZY = {
    "ReftDataset": "original.datasets",
    "ReftRawDataset": "original.datasets",
    "ReftGenerationDataset": "original.instructions",
    "ReftPreferenceDataset": "original.instructions",
    "ReftSupervisedDataset": "original.instructions",
    "ReftRewardCollator": "original.reward",
    "ReftRewardDataset": "original.reward",
    "ReftDataCollator": "data.supervised",
    "make_last_position_supervised_data_module": "original.data_modules",
    "make_multiple_position_supervised_data_module": "original.data_modules",
    "ReftTrainer": "training.trainer",
    "ReftTrainerForCausalLM": "training.trainer",
    "ReftTrainerForCausalLMDistributed": "training.trainer",
    "ReftTrainerForSequenceClassification": "training.trainer",
}

register_with_peft(ReftTuner)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
