"""Gradient checkpointing: a block that the backward computes once more edits what it edited the first time.

By then the model may have run other forwards, of other rows or with other adapters, as for a reference in DPO.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .locator import Locator


class Recomputation:
    """Binds what is located in a forward to the blocks that will be computed once more.

    Args:
        locator: of the model.
        model: whose modules say whether they checkpoint, and how, in the manner of transformers.
    """

    def __init__(self, locator: "Locator", model: nn.Module) -> None:
        self._locator = locator
        self._modules: list[Any] = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
        self._plain: list[tuple[Any, Callable]] = []  # the functions of the modules, while a forward runs

    def will_be(self, model: nn.Module) -> bool:
        """Whether the backward will compute blocks once more."""
        return model.training and torch.is_grad_enabled() and any(part.gradient_checkpointing for part in self._modules)

    def begin(self) -> None:
        """Before a forward: have the blocks called with what is located then."""
        self.end()  # of one that did not come to its end
        for module in self._modules:
            if (plain := getattr(module, "_gradient_checkpointing_func", None)) is not None:
                self._plain.append((module, plain))
                module._gradient_checkpointing_func = functools.partial(self._call, plain)

    def end(self) -> None:
        """After it."""
        for module, plain in self._plain:
            module._gradient_checkpointing_func = plain
        self._plain.clear()

    def _call(self, plain: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return plain(_Bound(self._locator, function), *args, **kwargs)


class _Bound:
    """A block's computation, which finds at each later call what was located at the first one."""

    def __init__(self, locator: "Locator", function: Callable) -> None:
        self._locator, self._function = locator, function
        self._state = locator.state()
        self._called = False
        self._alone = False  # whether it is differentiated by itself, as reentrant checkpointing does

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._called:
            self._called, self._alone = True, not torch.is_grad_enabled()
            return self._function(*args, **kwargs)
        with self._locator.recomputing(self._state, fresh=self._alone):
            return self._function(*args, **kwargs)
