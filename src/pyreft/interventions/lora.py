"""LoRA at located tokens: an edit whose source is what the module read."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from .intervention import Intervention
from .low_rank import linear


class LoraIntervention(Intervention):
    """LoRA: h' = h + (α/r) B A x, at the located tokens alone (arXiv 2106.09685, equation 3).

    h is what a linear layer writes, x what it read; A is `[r, k]` and B `[d, r]`. It starts at h' = h, with B = 0. At
    every token it is PEFT's LoRA. The parameters have other names than there, by which PEFT would take them for its
    own in a model that has a LoRA, too.

    Args:
        embed_dim: d, the width of what the layer writes.
        input_dim: k, the width of what it reads.
        low_rank_dimension: r.
        alpha: α, 2r if not given, so that the learning rate need not change with the rank.
        dropout: probability of dropout on the edit, h' - h, in training; that of PEFT's LoRA falls on x.
        dtype: type of the parameters, float32 if not given.
        device: where to put the parameters.

    Raises:
        ReftError: a rank below 1, or an α that is not above 0.
    """

    reads_input = True
    stackable = begins_at_identity = True

    def __init__(
        self,
        *,
        embed_dim: int,
        input_dim: int,
        low_rank_dimension: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        if not isinstance(low_rank_dimension, int) or low_rank_dimension < 1:
            raise ReftError(f"expected 1 or more, got {low_rank_dimension!r}.", setting="low_rank_dimension")
        if alpha is None:
            alpha = 2.0 * low_rank_dimension
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ReftError(f"expected a number above 0, got {alpha!r}.", setting="alpha")
        self.input_dim, self.low_rank_dimension, self.alpha = input_dim, low_rank_dimension, float(alpha)
        # begins as PEFT's: Kaiming's uniform, a = √5
        self.A = nn.Linear(input_dim, low_rank_dimension, bias=False, dtype=torch.float32)
        self.B = nn.Linear(low_rank_dimension, embed_dim, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.B.weight)
        self.to(device=device, dtype=dtype)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "low_rank_dimension": self.low_rank_dimension, "alpha": self.alpha}

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.low_rank_dimension

    def basis(self) -> Tensor:
        return self.B.weight.float().mT

    def formula(self, h: Tensor, x: Tensor, R: Tensor) -> Tensor:
        return h + self.scale * linear(self.A, x) @ R

    def extra_repr(self) -> str:
        return f"{self.input_dim} -> {self.embed_dim}, rank={self.low_rank_dimension}, alpha={self.alpha:g}"
