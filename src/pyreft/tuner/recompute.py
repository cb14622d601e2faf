"""Gradient checkpointing: a block that the backward computes once more edits what it edited the first time.

By then the model may have run other forwards, of other rows or with other adapters, as for a reference in DPO. So what
checkpoints a block, in the manner of transformers, takes along the call in which it first ran.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .call import Call, innermost, within

FUNCTION = "_gradient_checkpointing_func"  # where transformers' modules keep what checkpoints their blocks


def recomputes(model: nn.Module) -> bool:
    """Whether the backward of a forward that begins now will compute blocks, and so the edits in them, once more."""
    return (
        model.training
        and torch.is_grad_enabled()
        and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    )


def bind(edits: Any, model: nn.Module) -> None:
    """Let the checkpointed blocks of a model find their call again; once done, until checkpointing is set anew."""
    for module in model.modules():
        if (plain := getattr(module, FUNCTION, None)) is not None and not isinstance(plain, _Checkpoint):
            setattr(module, FUNCTION, _Checkpoint(edits, plain))


def unbind(model: nn.Module) -> None:
    """Give the modules back what checkpointed their blocks before."""
    for module in model.modules():
        if isinstance(bound := getattr(module, FUNCTION, None), _Checkpoint):
            setattr(module, FUNCTION, bound.plain)


class _Checkpoint:
    """Checkpoints a block's computation by `plain`, bound to the call that runs."""

    def __init__(self, edits: Any, plain: Callable) -> None:
        self.edits, self.plain = edits, plain

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        call = innermost(self.edits)
        return self.plain(_Bound(call, function) if isinstance(call, Call) else function, *args, **kwargs)


class _Bound:
    """A block's computation, which finds at each later run what was located at the first one."""

    def __init__(self, call: Call, function: Callable) -> None:
        self._call, self._function = copy.copy(call), function
        self._call.readings = dict(call.readings)  # of this forward
        self._ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ran:
            self._ran = True
            if not torch.is_grad_enabled():  # it is differentiated by itself: each R gets a graph of its own, too
                self._call.rotations = {}
            return self._function(*args, **kwargs)
        with within(self._call):
            return self._function(*args, **kwargs)
