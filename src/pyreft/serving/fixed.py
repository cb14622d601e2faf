"""The edits of a step in memory that does not move and with shapes that do not change, as CUDA graphs need them.

A graph replays kernels, no Python: what differs from step to step is what stands in the buffers. So every token has a
slot at every place, or none, whatever the step; `bank` is quicker where Python runs in each step. Knows no engine.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ReftError
from .affine import Edit, LowRank
from .tokens import Place, Step, by_layer

NONE = -1  # the slot of a token that is not edited


class FixedBank:
    """The weights of the adapters in all slots, and which token of the step has which slot where.

    Args:
        places: where anything may be edited in this process.
        slots: how many adapters it holds.
        rank: the greatest rank of an adapter.
        width: d, of the states.
        tokens: the most in a step.
        device: where it is.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        slots: int,
        rank: int,
        width: int,
        tokens: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.places = sorted(places)
        self.behind = by_layer(places)
        self._number = {place: number for number, place in enumerate(self.places)}
        many = len(self.places)
        self.a = torch.zeros(many, slots, rank, width, device=device)
        self.b = torch.zeros(many, slots, rank, device=device)
        self.out = torch.zeros(many, slots, rank, width, device=device)
        self.slot_of = torch.full((tokens, many), NONE, dtype=torch.int32, device=device)
        self.strength = torch.ones(tokens, device=device)
        self._filled = 0  # tokens behind which no slot stands

    def bytes(self) -> int:
        """How much memory the weights take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.a, self.b, self.out))

    @torch.inference_mode()
    def write(self, slot: int, edits: Mapping[Place, Edit]) -> None:
        """Put an adapter's edits into a slot; what was in it is gone.

        Raises:
            ReftError: an edit that is no product of low rank, or at a place that is not there; the slot is as it was.
        """
        for place, edit in edits.items():
            if place not in self._number or not isinstance(edit, LowRank) or edit.act is not None:
                raise ReftError(f"an edit behind block {place.layer} cannot be replayed in a CUDA graph.")
        for tensor in (self.a, self.b, self.out):
            tensor[:, slot] = 0
        for place, edit in edits.items():
            if isinstance(edit, LowRank):
                number, rank = self._number[place], len(edit.a)
                self.a[number, slot, :rank], self.out[number, slot, :rank] = edit.a, edit.out
                self.b[number, slot, :rank] = edit.b

    active = True  # whatever the step: a graph that is captured in one is replayed in others

    @torch.inference_mode()
    def begin(self, step: Step | None, tokens: int) -> None:
        """Write down what the step edits that now begins, of so many tokens; nothing of what fills up a graph."""
        tokens = tokens if step is not None else 0
        if not (count := max(tokens, self._filled)):
            return
        slots = np.full((count, len(self.places)), NONE, dtype=np.int32)
        strength = np.ones(count, dtype=np.float32)
        for number, place in enumerate(self.places if step is not None else ()):
            if step is not None and (found := step.at(place)) is not None:
                slots[found.at, number] = found.slots
                strength[found.at] = found.strength
        for target, values in ((self.slot_of, slots), (self.strength, strength)):
            source = torch.from_numpy(values)
            # in memory of its own: a copy of the step before may still be under way
            target[:count].copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
        self._filled = tokens

    def edit(self, place: Place, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the states of the step's tokens in place; see `Bank.edit`."""
        number = self._number[place]
        slots = self.slot_of[: len(hidden), number]
        if len(slots) < len(hidden):
            raise ValueError(f"expected at most {len(slots)} tokens in a step, got {len(hidden)}")
        weights = self.a[number], self.b[number], self.out[number]
        if hidden.is_cuda:
            from .kernel import edit
        else:
            edit = edit_plainly
        edit(hidden, residual, slots, self.strength, *weights)


def edit_plainly(
    hidden: Tensor, residual: Tensor | None, slots: Tensor, strength: Tensor, a: Tensor, b: Tensor, out: Tensor
) -> None:
    """What `kernel.edit` does, in operations of torch whose shapes depend on no value.

    Args:
        hidden: `[n, d]`, the states, or a part of them.
        residual: the other part, if there is one.
        slots: `[n]`, by token; negative where nothing is edited.
        strength: at least `[n]`, by which each token's edit is multiplied.
        a, b, out: `[slots, r, d]`, `[slots, r]` and `[slots, r, d]`.
    """
    at = slots.clamp(min=0).long()
    state = hidden if residual is None else hidden + residual
    inner = torch.baddbmm(b[at, None], state.float()[:, None], a[at].mT)  # [n, 1, r]
    delta = torch.bmm(inner, out[at])[:, 0] * strength[: len(hidden), None]
    edited, where = (state.float() + delta).to(state.dtype), (slots >= 0)[:, None]
    if residual is None:
        hidden.copy_(torch.where(where, edited, hidden))
    else:
        residual.copy_(torch.where(where, edited, residual))
        hidden.masked_fill_(where, 0)
