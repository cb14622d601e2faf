"""The six formulas of ReFT (arXiv 2404.03592): equations 3 and 4 and table 17."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import ReftError, did_you_mean
from .intervention import Intervention, check_rank
from .rotation import LowRankRotateLayer


class LowRankIntervention(Intervention):
    """h' = h + dropout(Bᵀ c(h)): c(h), `[n, r]`, are r coordinates along the directions in B, `[r, d]`.

    A subclass gives the formula of `coordinates`, and says which parameters it has: a source, W h + b or with
    `constant` the bare b, and a basis, the rows of R if `orthonormal` and of W₂ if not.

    Args:
        embed_dim: d, the width of the edited hidden states.
        low_rank_dimension: r, the rank of the edit, at most d.
        dropout: probability of dropout on the edit, h' - h, in training.
        act_fn: name of an activation of transformers (`"relu"`, `"gelu"`, ...); none is the identity.
        add_bias: give the projection W₂ of `NoreftIntervention` and `NodireftIntervention` a bias.
        dtype: type of the parameters, float32 if not given.
        device: where to put the parameters.

    Raises:
        ReftError: a rank below 1 or above the width, or an unknown activation.
    """

    orthonormal = True
    constant = False

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        check_rank(low_rank_dimension, embed_dim)
        if act_fn is not None and act_fn not in ACT2FN:
            raise ReftError(f"no activation is called {act_fn!r}.{did_you_mean(act_fn, ACT2FN)}", setting="act_fn")
        self.low_rank_dimension = low_rank_dimension
        self.act_fn_name = act_fn
        self.add_bias = add_bias
        self.act_fn = nn.Identity() if act_fn is None else ACT2FN[act_fn]
        if self.orthonormal:
            self.rotate_layer = LowRankRotateLayer(embed_dim, low_rank_dimension)
        else:
            self.proj_layer = nn.Linear(embed_dim, low_rank_dimension, bias=add_bias)
        self.learned_source: nn.Linear | nn.Parameter
        if self.constant:
            self.learned_source = nn.Parameter(torch.rand(low_rank_dimension))
        else:
            self.learned_source = nn.Linear(embed_dim, low_rank_dimension)
        self.to(device=device, dtype=dtype)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "low_rank_dimension": self.low_rank_dimension,
            "act_fn": self.act_fn_name,
            "add_bias": self.add_bias,
        }

    def coordinates(self, h: Tensor, basis: Tensor) -> Tensor:
        """Return the coordinates of the edit, `[n, r]`, or `[r]` if they are the same for every token."""
        raise NotImplementedError

    def edit(self, h: Tensor, subspaces: Tensor | None = None) -> Tensor:
        """Return h' - h; `subspaces`, `[n, r]`, is true for the directions that each token may move along."""
        basis = self.basis()
        coordinates = self.coordinates(h, basis)
        if subspaces is not None:
            coordinates = coordinates * subspaces
        return (coordinates @ basis).expand_as(h)

    def source(self, h: Tensor) -> Tensor:
        """Return act(W h + b), `[n, r]`, or b, `[r]`."""
        if isinstance(self.learned_source, nn.Linear):
            return self.act_fn(_linear(self.learned_source, h))
        return self.learned_source.float()

    def basis(self) -> Tensor:
        """Return R or W₂, `[r, d]`."""
        return self.rotate_layer.weight.mT if self.orthonormal else self.proj_layer.weight.float()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, rank={self.low_rank_dimension}"


def _linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """A linear layer in float32, whatever type its parameters have; it may be stacked."""
    product = h @ layer.weight.float().mT
    return product if layer.bias is None else product + layer.bias.float()


class LoreftIntervention(LowRankIntervention):
    """LoReFT: h' = h + Rᵀ(act(W h + b) - R h), with orthonormal rows of R (ReFT, equation 3)."""

    stackable = True

    def coordinates(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.source(h) - h @ basis.mT


class NoreftIntervention(LowRankIntervention):
    """NoReFT: h' = h + W₂ᵀ(act(W₁ h + b) - W₂ h), W₂ not orthonormal (ReFT, table 17)."""

    stackable = True
    orthonormal = False

    def coordinates(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.source(h) - _linear(self.proj_layer, h)


class ConsreftIntervention(LoreftIntervention):
    """ConsReFT: h' = h + Rᵀ(b - R h), the same r coordinates for every token (ReFT, table 17)."""

    stackable = True
    constant = True


class DireftIntervention(LowRankIntervention):
    """h' = h + Rᵀ act(W h + b), with orthonormal rows of R (ReFT, table 17, row 3).

    The paper calls another formula DiReFT: that one is `NodireftIntervention`.
    """

    stackable = True

    def coordinates(self, h: Tensor, basis: Tensor) -> Tensor:
        return self.source(h)


class LobireftIntervention(DireftIntervention):
    """LobiReFT: h' = h + Rᵀ b, a low-rank bias (ReFT, table 17)."""

    stackable = True
    constant = True


class NodireftIntervention(DireftIntervention):
    """DiReFT as the paper defines it: h' = h + W₂ᵀ act(W₁ h + b), W₂ not orthonormal (ReFT, equation 4).

    With `add_bias`, W₂ has a bias that enters no formula, as in the original library.
    """

    stackable = True
    orthonormal = False
