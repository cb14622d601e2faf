"""Two threads that train one model at once are told: their gradients would meet in the same parameters.

A step counts from its forward until its graph is gone, and it is one for training when its backward begins.
"""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..errors import ReftError


class Steps:
    """The steps of a model whose backward has not yet run."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[_Step] = weakref.WeakSet()

    def __getstate__(self) -> dict:  # a copy of the model has none
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def watch(self, output: Any) -> None:
        """Look at the backward of a forward with this output."""
        tensors = [tensor for tensor in _tensors(output) if tensor.grad_fn is not None]
        if tensors:
            step = _Step(self._alive)
            self._alive.add(step)
            for tensor in tensors:
                tensor.register_hook(step.check)  # which keeps the step alive as long as the graph


class _Step:
    def __init__(self, alive: "weakref.WeakSet[_Step]") -> None:
        self._thread, self._alive = threading.current_thread(), alive

    def check(self, gradient: Tensor) -> None:
        """At the beginning of a backward."""
        for other in list(self._alive):
            if other._thread is not self._thread and other._thread.is_alive():
                raise ReftError(
                    "Two threads train this model at once, and their gradients would be added to the same parameters. "
                    "Train in one thread, or give each thread a copy of the model."
                )


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    yield from (value for value in values if isinstance(value, Tensor))
