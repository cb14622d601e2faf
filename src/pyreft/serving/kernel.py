"""The edit of a step's tokens as one kernel of Triton: a program for each token, which ends at once if it has no slot.

It reads the slots from memory, so that a CUDA graph which replays it edits what stands there by then.
`fixed.edit_plainly` is the same in torch.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # dimensions at a time


@triton.jit
def _state(hidden, residual, at, inside, PAIR: tl.constexpr):
    """The states at some dimensions, float32: if they are the sum of two parts, as rounded as the model rounds it."""
    state = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if PAIR:
        state += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        state = state.to(hidden.dtype.element_ty).to(tl.float32)
    return state


@triton.jit
def _edit(
    hidden,
    residual,
    slots,
    strength,
    a,
    b,
    out,
    width,
    hidden_row,
    residual_row,
    slots_row,
    PAIR: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_row).to(tl.int64)
    if slot >= 0:
        hidden += token * hidden_row
        residual += token * residual_row
        kind = hidden.dtype.element_ty
        rank = tl.arange(0, RANKS)
        low = rank < RANK
        rows = (slot * RANK + rank[:, None]) * width
        inner = tl.load(b + slot * RANK + rank, mask=low, other=0.0)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            state = _state(hidden, residual, at, inside, PAIR)
            weight = tl.load(a + rows + at[None, :], mask=low[:, None] & inside[None, :], other=0.0)
            inner += tl.sum(weight * state[None, :], axis=1)
        inner *= tl.load(strength + token)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            state = _state(hidden, residual, at, inside, PAIR)
            weight = tl.load(out + rows + at[None, :], mask=low[:, None] & inside[None, :], other=0.0)
            edited = state + tl.sum(weight * inner[:, None], axis=0)
            if PAIR:
                tl.store(residual + at, edited.to(kind), mask=inside)
                tl.store(hidden + at, tl.zeros_like(edited).to(kind), mask=inside)
            else:
                tl.store(hidden + at, edited.to(kind), mask=inside)


def edit(
    hidden: Tensor, residual: Tensor | None, slots: Tensor, strength: Tensor, a: Tensor, b: Tensor, out: Tensor
) -> None:
    """Edit states in place; see `fixed.edit_plainly`."""
    if not len(hidden):
        return
    if hidden.stride(-1) != 1 or (residual is not None and residual.stride(-1) != 1):
        raise ValueError(f"expected states whose rows are contiguous, got strides {hidden.stride()}")
    rank, width = a.shape[1:]
    pair = residual is not None
    other = hidden if residual is None else residual
    _edit[(len(hidden),)](
        hidden,
        other,
        slots,
        strength,
        a,
        b,
        out,
        width,
        hidden.stride(0),
        other.stride(0),
        slots.stride(0),
        PAIR=pair,
        RANK=rank,
        RANKS=triton.next_power_of_2(rank),
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
    )
