"""The original's module of this name; the code is in `pyreft.training.trainer` and `pyreft.original.data_modules`."""

from .data.supervised import ReftDataCollator
from .original.data_modules import make_data_collator, make_dataloader
from .training.trainer import (
    ReftTrainer,
    ReftTrainerForCausalLM,
    ReftTrainerForCausalLMDistributed,
    ReftTrainerForSequenceClassification,
)

__all__ = [
    "ReftDataCollator",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "make_data_collator",
    "make_dataloader",
]
