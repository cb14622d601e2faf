"""What the original takes as a config: its own, pyvene's, or bare representations."""

import enum
from typing import Any

from peft import PeftConfig

from ..errors import ReftError
from ..tuner.config import ReftConfig


def as_config(config: Any) -> ReftConfig:
    """Return a config of ours for whatever the original takes as one.

    Args:
        config: a `ReftConfig`, pyvene's `IntervenableConfig`, or one or several representations as dicts.

    Raises:
        ReftError: anything else, such as the config of another method.
    """
    if isinstance(config, ReftConfig):
        return config
    if isinstance(config, dict | list):
        return ReftConfig(representations=config)
    if hasattr(config, "representations") and not isinstance(config, PeftConfig):
        types = getattr(config, "intervention_types", None)
        return ReftConfig(representations=config.representations, intervention_types=types)
    raise ReftError(f"expected a ReftConfig, got {type(config).__name__}.", setting="reft_config")


class ReftType(str, enum.Enum):  # noqa: UP042 (as it was)
    """The original's list of methods, of which nothing made use."""

    LOREFT = "LOREFT"
    NLOREFT = "NOREFT"
