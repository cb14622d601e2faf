"""The PEFT tuner: what hangs interventions on a model and edits its states at the located tokens."""

from .tuner import ReftTuner, calls_tuner, detach, edits_of, penalty, reft_layers, tuner_of

__all__ = ["ReftTuner", "calls_tuner", "detach", "edits_of", "penalty", "reft_layers", "tuner_of"]
