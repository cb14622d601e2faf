"""The original's module of this name; the code is in `pyreft.training.trainer` and `pyreft.data.supervised`."""

from .data.supervised import ReftDataCollator
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
]
