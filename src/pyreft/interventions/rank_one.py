"""ReFT-r1: one direction that both detects a concept and steers to it (AxBench, arXiv 2501.17148, section 4)."""

from typing import Any

import torch
from torch import Tensor

from ..errors import ReftError
from .intervention import Intervention
from .rotation import OrthonormalColumns


class Reftr1Intervention(Intervention):
    """ReFT-r1: h' = h + m w, with a unit vector w and the same strength m for all edited tokens of a row.

    m is the mean of the `top_k` largest latents ReLU(w·h) among these tokens, as far as one forward sees them: a prompt
    in chunks, or each token that is generated after `positions="all"`, has an m of its own. In training, λ times the
    mean of the other latents is added to the loss, so that few tokens activate the concept.

    Args:
        embed_dim: d, the width of the edited hidden states.
        dropout: probability of dropout on the edit, h' - h, in training.
        top_k: how many latents count; all of them in a row that has fewer edited tokens.
        l1: λ.
    """

    by_row = True

    def __init__(self, *, embed_dim: int, dropout: float = 0.0, top_k: int = 8, l1: float = 0.005) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        if not isinstance(top_k, int) or top_k < 1:
            raise ReftError(f"expected at least one latent that counts, got {top_k}.", setting="top_k")
        self.top_k, self.l1 = top_k, l1
        self.rotate_layer = OrthonormalColumns(embed_dim, 1)
        self._penalty: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "top_k": self.top_k, "l1": self.l1}

    def basis(self) -> Tensor:
        return self.rotate_layer.weight.mT

    def latents(self, h: Tensor, R: Tensor | None = None) -> Tensor:
        """Return how strongly the concept is present in each state, `[n]`, not negative; R is w, `[1, d]`."""
        return (h.float() @ (self.basis() if R is None else R).mT).squeeze(-1).relu()

    def formula(self, h: Tensor, R: Tensor, rows: Tensor) -> Tensor:
        latents = self.latents(h, R)
        _, rows, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
        columns = torch.arange(len(rows), device=h.device) - (counts.cumsum(0) - counts)[rows]
        table = latents.new_full((len(counts), int(counts.max())), -1).index_put((rows, columns), latents)
        top = table.topk(min(self.top_k, table.shape[1])).values
        chosen = (top >= 0).to(top.dtype)
        strength = (top * chosen).sum(-1) / chosen.sum(-1)
        if self.training:
            rest = latents.sum() - (top * chosen).sum()
            self._penalty = self.l1 * rest / (counts.sum() - chosen.sum()).clamp(min=1)
        return h + strength[rows].unsqueeze(-1) * R

    def penalty(self) -> Tensor | None:
        taken, self._penalty = self._penalty, None
        learns = torch.is_grad_enabled() and self.rotate_layer.free.requires_grad
        if taken is not None and learns and not taken.requires_grad:
            raise ReftError(
                "ReFT-r1's penalty has no gradient, since its block was computed without one and will be computed once "
                'more in the backward. Use gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        return taken

    def __getstate__(self) -> dict:  # a penalty belongs to one forward and its graph
        return {**self.__dict__, "_penalty": None}
