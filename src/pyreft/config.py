"""The original's module of this name; the code is in `pyreft.tuner`."""

from .tuner.config import ReftConfig
from .tuner.representation import Representation

__all__ = ["ReftConfig", "Representation"]
