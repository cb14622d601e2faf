"""The PEFT tuner: what hangs interventions on a model and edits its states at the located tokens."""

from .adapted import edits_of, penalty, reft_layers
from .injection import detach
from .tuner import ReftTuner, calls_tuner, tuner_of

__all__ = ["ReftTuner", "calls_tuner", "detach", "edits_of", "penalty", "reft_layers", "tuner_of"]
