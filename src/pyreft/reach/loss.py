"""The loss of a causal language model where there are labels, in chunks that bound what a large vocabulary takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 128 * 2**20  # of float32 logits at a time


def label_loss(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, count: Any = None
) -> Tensor:
    """Return the cross-entropy of logits = head(hidden), summed and divided by `count`, or by the number of targets.

    The head is frozen, so the gradient of each chunk is computed with its loss, and no logits are kept.

    Args:
        hidden: `[n, d]`, final states of the tokens before those with labels.
        targets: `[n]`.
        head: from `[m, d]` to logits `[m, vocabulary]`.
        count: a number or a scalar tensor.
    """
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
    total = _ChunkedLoss.apply(hidden, targets, head, chunk)
    if isinstance(count, Tensor):
        count = count.to(total.device)
    return total / (len(targets) if count is None else count)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Callable, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(part).float()
                loss = nn.functional.cross_entropy(
                    logits, targets[start : start + chunk].to(logits.device), reduction="sum"
                )
            if gradient is not None:
                gradient[start : start + chunk] = torch.autograd.grad(loss, part)[0]
            total = total + loss.detach().to(total.device)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * scale.to(gradient.dtype), None, None, None
