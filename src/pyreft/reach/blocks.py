"""Running only some of a model's blocks, with no word of their class: those before an edit alone, or those behind it.

The model is not touched, see `views`: a block in which a forward is to end raises what it computed, and blocks that are
left out return what they get.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..places.structure import find_blocks, path_of
from .rows import NotExactError
from .views import Forward, view


class _Ended(Exception):
    """The forward has come to where it is to end.

    Args:
        output: what the last block returned.
    """

    def __init__(self, output: Any) -> None:
        self.output = output


class Blocks:
    """The blocks of a model.

    Args:
        base: the model.
        callers: it, what is around it, or what is in it and has the blocks: what may be run with some of them.
    """

    def __init__(self, base: nn.Module, callers: Iterable[nn.Module]) -> None:
        _, self._blocks = find_blocks(base)
        self._paths = {caller: path_of(caller, self._blocks) for caller in callers}
        self._numbers: dict[int, int] = {}
        if len(set(self._blocks)) == len(self._blocks):  # one that stands in two places cannot be left out of one
            for number, block in enumerate(self._blocks):
                self._numbers.update({id(module): number for module in block.modules()})
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

    def states(self, caller: nn.Module, count: int, **call: Any) -> Tensor:
        """Run the first `count` blocks alone; return the last one's output, `[batch, tokens, d]`.

        Raises:
            NotExactError: the model does not come to this block.
        """
        last = self._blocks[count - 1]

        def end(*args: Any, **kwargs: Any) -> Any:
            raise _Ended(last.forward(*args, **kwargs))

        try:
            self._view(caller, {count - 1: end})(**call)
        except _Ended as ended:
            self._length = None if isinstance(ended.output, Tensor) else len(ended.output)
            return ended.output if isinstance(ended.output, Tensor) else ended.output[0]
        raise NotExactError(f"the blocks of {type(caller).__name__} are not called where they are found")

    def above(self, caller: nn.Module, count: int, states: Tensor | None) -> Any:
        """A view of a module that leaves out the first `count` blocks, whose output is given, `[batch, tokens, d]`."""

        def give(*args: Any, **kwargs: Any) -> Any:
            return self._form(states)

        given: dict[int, Forward] = {count - 1: give} if count else {}
        return self._view(caller, dict.fromkeys(range(count - 1), self._pass_on) | given)

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._form(args[0] if args else kwargs["hidden_states"])

    def _form(self, states: Tensor | None) -> Any:
        return states if self._length is None else (states, *[None] * (self._length - 1))

    def _view(self, caller: nn.Module, forwards: dict[int, Forward]) -> Any:
        path = self._paths[caller]
        return view(caller, {f"{path}.{number}": forward for number, forward in forwards.items()})
