"""The original's module of this name; the code is in `pyreft.tuner.config`."""

from .tuner.config import ReftConfig, Representation

__all__ = ["ReftConfig", "Representation"]
