"""Tuning: the settings of an adapter and of its training found for some data, as `pyreft tune` does it."""

from .outcome import Tuned
from .records import Record
from .search import tune

__all__ = ["Record", "Tuned", "tune"]
