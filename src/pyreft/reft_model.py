"""The original's module of this name; the code is in `pyreft.model`."""

from torch import nn

from .model import ReftModel

__all__ = ["ReftModel", "count_parameters"]


def count_parameters(model: nn.Module) -> int:
    """How many parameters of a module are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
