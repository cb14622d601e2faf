"""Running only some of a model's blocks, with no word of their class: for one forward, others return what they get."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..places.structure import find_blocks


class Blocks:
    """The blocks of a model.

    Args:
        base: the model.
    """

    def __init__(self, base: nn.Module) -> None:
        _, self._blocks = find_blocks(base)
        self._numbers = {id(module): number for number, block in enumerate(self._blocks) for module in block.modules()}
        self._length: int | None = None  # of the tuple that a block returns; none for a tensor

    def __len__(self) -> int:
        return len(self._blocks)

    def below(self, places: Iterable[tuple[nn.Module, str]]) -> int:
        """How many blocks lie below the first of some places, each the `"input"` or the `"output"` of a module."""
        count = len(self)
        for module, side in places:
            number = self._numbers.get(id(module))
            if number is None:
                return 0
            count = min(count, number + (module is self._blocks[number] and side == "output"))
        return count

    def modules_from(self, start: int) -> set[nn.Module]:
        """What the blocks from `start` on are made of now."""
        return {module for block in self._blocks[start:] for module in block.modules()}

    def device_of(self, number: int) -> torch.device:
        """Where a block's parameters are."""
        return next(self._blocks[number].parameters()).device

    @contextmanager
    def stopping_after(self, count: int) -> Iterator[list[Tensor]]:
        """Run the first `count` blocks alone; the list then holds the last one's output, `[batch, tokens, d]`."""
        last, found = self._blocks[count - 1].forward, []

        def record(*args: Any, **kwargs: Any) -> Any:
            output = last(*args, **kwargs)
            self._length = None if isinstance(output, Tensor) else len(output)
            found.append(output if isinstance(output, Tensor) else output[0])
            return output

        with self._replaced({count - 1: record} | dict.fromkeys(range(count, len(self)), self._pass_on)):
            yield found

    @contextmanager
    def starting_after(self, count: int, states: Tensor | None) -> Iterator[None]:
        """Leave out the first `count` blocks, whose output is given, `[batch, tokens, d]`."""

        def give(*args: Any, **kwargs: Any) -> Any:
            return self._form(states)

        given: dict[int, Callable] = {count - 1: give} if count else {}
        with self._replaced(dict.fromkeys(range(count - 1), self._pass_on) | given):
            yield

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._form(args[0] if args else kwargs["hidden_states"])

    def _form(self, states: Tensor | None) -> Any:
        return states if self._length is None else (states, *[None] * (self._length - 1))

    @contextmanager
    def _replaced(self, forwards: dict[int, Callable]) -> Iterator[None]:
        with replaced({self._blocks[number]: forward for number, forward in forwards.items()}):
            yield


@contextmanager
def replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Let modules compute something else; their hooks, of edits and of whoever manages devices, still run."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
