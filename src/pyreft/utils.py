"""The original's module of this name; the code is in `pyreft.model`."""

from peft import TaskType

from .model import ReftModel, get_reft_model

__all__ = ["ReftModel", "TaskType", "get_reft_model"]
