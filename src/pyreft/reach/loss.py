"""What a causal language model gives to its labels, in chunks that bound what a large vocabulary takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .origin import functions_of, module_of

_LOSSES = "transformers.loss.loss_utils"
# whose code leaves it as it is
_WITH_THAT_LOSS = ("transformers.", "accelerate.", "trl.", "torch.utils.", "pyreft.tuner.")
CHUNK_BYTES = 128 * 2**20  # of float32 logits at a time


def log_probs(hidden: Tensor, targets: Tensor, unembed: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """Return log softmax(unembed(hidden)) at the targets, `[n]`, in float32.

    The unembedding is frozen, so the gradient of each chunk is computed with it, and no logits are kept.

    Args:
        hidden: `[n, d]`, final states of the tokens before those with labels.
        targets: `[n]`.
        unembed: from `[m, d]` to logits `[m, vocabulary]`.
    """
    return _LogProbs.apply(hidden, targets, unembed, max(1, CHUNK_BYTES // (4 * vocabulary)))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, unembed: Callable, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        found = []
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = unembed(part).float()
                there = targets[start : start + chunk].to(logits.device)
                values = -nn.functional.cross_entropy(logits, there, reduction="none")
            if gradient is not None:  # of each value, which rests on one state alone
                gradient[start : start + chunk] = torch.autograd.grad(values, part, torch.ones_like(values))[0]
            found.append(values.detach().to(hidden.device))
        ctx.save_for_backward(gradient)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * scale[:, None].to(gradient.dtype), None, None, None


def own_loss(base: Any) -> str | None:
    """Why the loss of a language model may be another than transformers' mean over the labels, if it may.

    It may be set: as `loss_function`, on the model, its class or in transformers' table. And it may be computed by
    code that is not transformers': a `forward` of a subclass, or one that was put in the place of the model's.
    """
    loss = getattr(base, "loss_function", None)
    inner = getattr(loss, "__globals__", {}).get("fixed_cross_entropy")
    if any(module_of(part) != _LOSSES for part in (loss, inner)) or getattr(loss, "__name__", "") != "ForCausalLMLoss":
        return f"{type(base).__name__} has a loss function of its own"
    for function in functions_of(base.forward):
        if not module_of(function).startswith(_WITH_THAT_LOSS):
            return f"{type(base).__name__} may compute another loss: its forward is that of {module_of(function)}"
    return None
