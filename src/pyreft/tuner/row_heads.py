"""Trained heads of calls: each row is computed by the head of its adapter, and none in a call of the base model alone.

PEFT's wrapper of a head computes all rows with that of the active adapter, and is switched off for all threads.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from ..errors import ReftError
from .call import Call, innermost
from .located import times_of


def attend(edits: Any, heads: Iterable[AuxiliaryTrainingWrapper]) -> None:
    """Let trained heads heed the `adapter_names` of the calls of a model, from now on."""
    for head in heads:
        if not any(isinstance(hook, _ByRow) for hook in head._forward_hooks.values()):
            head.register_forward_hook(_ByRow(edits), with_kwargs=True)


def heed(edits: Any, heads: Iterable[AuxiliaryTrainingWrapper]) -> None:
    """Let trained heads be switched off for calls of the base model alone, from now on, and for no others."""
    for head in heads:
        if not head.disable_adapters:  # by PEFT, for all calls
            head._disable_adapters = _Off(edits)


class _Off:
    """Whether a head is switched off, for the thread that asks: what PEFT's wrapper has where others have a bool.

    Args:
        edits: of the model.
    """

    def __init__(self, edits: Any) -> None:
        self.edits = edits

    def __bool__(self) -> bool:
        frame = innermost(self.edits)
        return frame is not None and frame.off


class _ByRow:
    """Puts what the heads of the rows' adapters compute in the place of what that of the active one did.

    Args:
        edits: of the model; which names a call has, the thread knows that makes it.
    """

    def __init__(self, edits: Any) -> None:
        self.edits = edits

    def __call__(self, head: Any, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        call = innermost(self.edits)
        names = None if call is None else call.row_adapters
        if names is None or head.disable_adapters:
            return None
        own = dict(head.modules_to_save.items())
        of_row = [own.get(name, head.original_module) for name in names]
        # more, such as a cache, would be of all rows
        more = any(value is not None for value in (*args[1:], *kwargs.values()))
        if more or not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise ReftError(
                f"a trained {type(head.original_module).__name__} takes and returns more than a tensor of rows, so it "
                "cannot be that of each row's own adapter. Call the model once for each adapter.",
                setting="adapter_names",
            )
        x = args[0]
        times = times_of(names, len(x), isinstance(call, Call) and call.generating)
        rows = {module: [one is module for one in of_row for _ in range(times)] for module in dict.fromkeys(of_row)}
        found = None
        for module, mine in rows.items():
            at = torch.tensor(mine, device=x.device).nonzero()[:, 0]
            part = module(x[at])
            found = part.new_empty((len(x), *part.shape[1:])) if found is None else found
            found = found.index_copy(0, at, part)
        return found
