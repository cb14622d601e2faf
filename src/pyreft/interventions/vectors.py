"""Edits with one number or two for each dimension of the state, without a rank."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from .intervention import Intervention


class BiasIntervention(Intervention):
    """h' = h + b, `[d]`: a steering vector, learned or given (ActAdd, arXiv 2308.10248; BitFit, arXiv 2106.10199)."""

    stackable = begins_at_identity = True

    def __init__(self, *, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        self.bias = nn.Parameter(torch.zeros(embed_dim, dtype=torch.float32))

    def formula(self, h: Tensor) -> Tensor:
        return h + self.bias.float()


class RedIntervention(Intervention):
    """RED: h' = s ⊙ h + b, starting at s = 1 and b = 0 (arXiv 2402.15179, equation 3)."""

    stackable = begins_at_identity = True

    def __init__(self, *, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        self.scale = nn.Parameter(torch.ones(embed_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(embed_dim, dtype=torch.float32))

    def formula(self, h: Tensor) -> Tensor:
        return self.scale.float() * h + self.bias.float()


class RoadIntervention(Intervention):
    """RoAd: each pair of dimensions is rotated by θ and scaled by α, starting at θ = 0 and α = 1.

    (h'₂ᵢ, h'₂ᵢ₊₁) = αᵢ (h₂ᵢ cos θᵢ - h₂ᵢ₊₁ sin θᵢ, h₂ᵢ sin θᵢ + h₂ᵢ₊₁ cos θᵢ) (arXiv 2409.00119, RoAd₁).

    Raises:
        ReftError: an odd width.
    """

    stackable = begins_at_identity = True

    def __init__(self, *, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        if embed_dim % 2:
            raise ReftError(
                f"'road' rotates pairs of dimensions; the width {embed_dim} is odd.", setting="intervention"
            )
        self.theta = nn.Parameter(torch.zeros(embed_dim // 2, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.ones(embed_dim // 2, dtype=torch.float32))

    def formula(self, h: Tensor) -> Tensor:
        cos, sin = self.alpha.float() * self.theta.float().cos(), self.alpha.float() * self.theta.float().sin()
        even, odd = h[..., 0::2], h[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class LofitIntervention(Intervention):
    """LoFiT's first step, on single attention heads: h' = (1 + a) ⊙ h (arXiv 2406.01563, section 3).

    The norm of a tells how much a head matters; for the second step, edit the best heads with `BiasIntervention`.

    Args:
        l1: λ of the penalty λ‖a‖₁ on the training loss.
    """

    stackable = begins_at_identity = True

    def __init__(self, *, embed_dim: int, dropout: float = 0.0, l1: float = 0.0) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        self.l1 = l1
        self.scale = nn.Parameter(torch.zeros(embed_dim, dtype=torch.float32))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "l1": self.l1}

    def formula(self, h: Tensor) -> Tensor:
        return (1 + self.scale.float()) * h

    def penalty(self) -> Tensor | None:
        return self.l1 * self.scale.float().abs().sum() if self.l1 else None


class JolaIntervention(Intervention):
    """JoLA, on single attention heads: h' = (1 + g_m m) ⊙ h + g_a a (arXiv 2502.01179, equations 3 to 5).

    The two gates g lie in [0, 1] and decide, while training, whether the head is scaled, shifted, both or left alone:
    hard concrete variables (arXiv 1712.01312), drawn at random in training and fixed in evaluation.

    Args:
        l0: λ of the penalty on the training loss, λ times the expected number of open gates.
    """

    stackable = begins_at_identity = True

    TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1

    def __init__(self, *, embed_dim: int, dropout: float = 0.0, l0: float = 0.0) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        self.l0 = l0
        self.scale = nn.Parameter(torch.zeros(embed_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(embed_dim, dtype=torch.float32))
        self.log_alpha = nn.Parameter(torch.zeros(2, dtype=torch.float32))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "l0": self.l0}

    def gates(self) -> Tensor:
        """Return g_m and g_a."""
        logits = self.log_alpha.float()
        if self.training:
            logits = (logits + torch.logit(torch.rand_like(logits), eps=1e-6)) / self.TEMPERATURE
        return (logits.sigmoid() * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def formula(self, h: Tensor) -> Tensor:
        scaled, shifted = self.gates().split(1, dim=-1)
        return (1 + scaled * self.scale.float()) * h + shifted * self.bias.float()

    def penalty(self) -> Tensor | None:
        if not self.l0:
            return None
        shift = self.TEMPERATURE * math.log(-self.LOW / self.HIGH)
        return self.l0 * (self.log_alpha.float() - shift).sigmoid().sum()
