"""Which values each setting of a job can have by itself; without torch, transformers or PEFT, so told at once."""

from collections.abc import Mapping
from typing import Any, get_args

from ..data.fields import FORMATS
from ..data.tally import LongRows
from ..errors import ReftError, did_you_mean

# the paper's names, and the formula that each stands for; LoRA is here to be compared with
METHODS: dict[str, str | None] = {"loreft": "loreft", "direft": "nodireft", "lora": None}
SCHEDULERS = ("constant", "linear", "cosine")  # of those of transformers
_CHOICES = {"method": (*METHODS,), "lr_scheduler_type": SCHEDULERS, "format": FORMATS, "long_rows": get_args(LongRows)}
_POSITIVE = (
    *("epochs", "lr", "batch_size", "gradient_accumulation"),
    *("save_steps", "alpha", "limit", "early_stopping"),
)
_SHARES = ("dropout", "warmup_ratio", "adam_beta1", "validation_split")


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuse numbers and words that no training can have; a number that is written as a text is not looked at.

    Raises:
        ReftError: the first of them.
    """
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(name, value)
        known = _CHOICES.get(name, (value,))
        if value is not None and value not in known:
            hint = did_you_mean(value, known) if isinstance(value, str) else ""
            raise ReftError(f"expected {', '.join(known)}, got {value!r}.{hint}", setting=name)


def _check_number(name: str, value: float) -> None:
    if name in _POSITIVE and not value > 0:
        raise ReftError(f"expected a number above 0, got {value}.", setting=name)
    if name == "seed" and not 0 <= value < 2**32:
        raise ReftError(f"expected a number from 0 to 2**32 - 1, got {value}.", setting=name)
    if name == "weight_decay" and value < 0:
        raise ReftError(f"expected 0 or more, got {value}.", setting=name)
    if name in _SHARES and not 0 <= value < 1:
        raise ReftError(f"expected a share from 0 to below 1, got {value}.", setting=name)
