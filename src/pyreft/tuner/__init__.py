"""The PEFT tuner: what hangs interventions on a model and edits its states at the located tokens.

Importing it makes PEFT know the method.
"""

from .adapted import edits_of, penalty, reft_layers
from .config import register_with_peft
from .injection import detach
from .lora_only import name_ours
from .tuner import ReftTuner, calls_tuner, tuner_of

__all__ = ["ReftTuner", "calls_tuner", "detach", "edits_of", "penalty", "reft_layers", "tuner_of"]

register_with_peft(ReftTuner)
name_ours()
