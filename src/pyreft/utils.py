"""The original's module of this name; the code is in `pyreft.model`."""

from peft import TaskType

from .model import ReftModel, get_reft_model
from .original.configs import ReftType

__all__ = ["ReftModel", "ReftType", "TaskType", "get_reft_model"]
