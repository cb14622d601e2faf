"""The edits: small modules that map a hidden state h to h'.

Each sees only the gathered states of the tokens to edit, `[n, d]`. Which tokens these are, and where in a
network, is not known here. Formulas: ReFT (arXiv 2404.03592), equations 3 and 4 and table 17.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .errors import ReftError, did_you_mean


def orthonormal_columns(free: Tensor) -> Tensor:
    """Map free matrices `[..., d, r]` to the matrices of the same shape with orthonormal columns, in float32.

    The Q of a QR decomposition with a positive diagonal of R: a smooth, unique map that leaves a matrix with
    orthonormal columns as it is. Matrices of one shape go through one batched call.
    """
    q, r = torch.linalg.qr(free.float())
    return q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


class LowRankRotateLayer(nn.Module):
    """R, kept as `weight` `[d, r]` with orthonormal columns whatever the optimiser does to the `free` parameter."""

    def __init__(self, embed_dim: int, low_rank_dimension: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(embed_dim, low_rank_dimension))
        if not self.free.is_meta:
            nn.init.orthogonal_(self.free)
        self._ready: Tensor | None = None
        self._made_from: tuple | None = None

    def _state(self) -> tuple:
        return self.free._version, self.free.data_ptr(), self.free.device

    @property
    def weight(self) -> Tensor:
        """R as `[d, r]`, float32; in evaluation it is computed once and kept until the parameter changes."""
        if self._ready is not None and self._made_from == self._state():
            return self._ready
        value = orthonormal_columns(self.free)
        if not value.requires_grad and not self.training:
            self.keep(value)
        return value

    def keep(self, value: Tensor) -> None:
        """Serve this R, computed from the parameter as it is now (see `orthonormalize`), until `forget`."""
        self._ready, self._made_from = value, self._state()

    def forget(self) -> None:
        """Drop a kept R, so that the next use computes it anew."""
        self._ready = self._made_from = None

    def forget_graph(self) -> None:
        """Drop a kept R that belongs to the autograd graph of one step."""
        if self._ready is not None and self._ready.requires_grad:
            self.forget()

    def train(self, mode: bool = True) -> "LowRankRotateLayer":
        self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict:  # a kept R belongs to one forward and its graph: copies and pickles go without
        return {**self.__dict__, "_ready": None, "_made_from": None}

    @torch.no_grad()
    def set_(self, rotation: Tensor) -> None:
        """Set R to a `[d, r]` matrix with orthonormal columns."""
        self.free.copy_(rotation)
        self.forget()

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


def orthonormalize(rotations: Sequence[LowRankRotateLayer]) -> None:
    """Compute the R of many layers, all of the same shape and device in one batched call, and keep them."""
    groups: dict[tuple, list[LowRankRotateLayer]] = {}
    for rotation in rotations:
        if torch.is_grad_enabled() and rotation.free.requires_grad:
            rotation.forget()
        elif rotation._made_from == rotation._state():
            continue
        groups.setdefault((rotation.free.shape, rotation.free.device), []).append(rotation)
    for group in groups.values():
        stacked = orthonormal_columns(torch.stack([rotation.free.float() for rotation in group]))
        for rotation, value in zip(group, stacked.unbind(), strict=True):
            rotation.keep(value)


class Intervention(nn.Module):
    """What all edits share: h' = h + dropout(edit(h)), computed in float32 and cast back to the type of h.

    A subclass gives the formula of `edit`, and says which parameters it has: a source, W h + b or with `constant`
    the bare b, and a basis of r directions, the rows of R if `orthonormal` and of W₂ if not.

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
        super().__init__()
        if not 1 <= low_rank_dimension <= embed_dim:
            raise ReftError(
                f"low_rank_dimension: expected a rank from 1 to the width {embed_dim} of the edited states, "
                f"got {low_rank_dimension}."
            )
        if act_fn is not None and act_fn not in ACT2FN:
            raise ReftError(f"act_fn: no activation is called {act_fn!r}.{did_you_mean(act_fn, ACT2FN)}")
        self.embed_dim = embed_dim
        self.low_rank_dimension = low_rank_dimension
        self.act_fn_name = act_fn
        self.add_bias = add_bias
        self.act_fn = nn.Identity() if act_fn is None else ACT2FN[act_fn]
        self.dropout = nn.Dropout(dropout)
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

    def edit(self, h: Tensor) -> Tensor:
        """Return h' - h for float32 states h `[n, d]`."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        """Return h' for the states h `[n, d]`, in the type of h."""
        with torch.autocast(h.device.type, enabled=False):
            wide = h.float()
            return (wide + self.dropout(self.edit(wide))).to(h.dtype)

    def source(self, h: Tensor) -> Tensor:
        """Return act(W h + b), `[n, r]`, or b, `[r]`."""
        if isinstance(self.learned_source, nn.Linear):
            return self.act_fn(_linear(self.learned_source, h))
        return self.learned_source.float()

    def basis(self) -> Tensor:
        """Return R or W₂, `[r, d]`."""
        return self.rotate_layer.weight.T if self.orthonormal else self.proj_layer.weight.float()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, rank={self.low_rank_dimension}"


def _linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """A linear layer in float32, whatever type its parameters have."""
    return F.linear(h, layer.weight.float(), None if layer.bias is None else layer.bias.float())


class LoreftIntervention(Intervention):
    """LoReFT: h' = h + Rᵀ(act(W h + b) - R h), with orthonormal rows of R (ReFT, equation 3)."""

    def edit(self, h: Tensor) -> Tensor:
        basis = self.basis()
        return (self.source(h) - h @ basis.T) @ basis


class NoreftIntervention(Intervention):
    """NoReFT: h' = h + W₂ᵀ(act(W₁ h + b) - W₂ h), W₂ not orthonormal (ReFT, table 17)."""

    orthonormal = False

    def edit(self, h: Tensor) -> Tensor:
        return (self.source(h) - _linear(self.proj_layer, h)) @ self.basis()


class ConsreftIntervention(LoreftIntervention):
    """ConsReFT: h' = h + Rᵀ(b - R h), the same r coordinates for every token (ReFT, table 17)."""

    constant = True


class DireftIntervention(Intervention):
    """h' = h + Rᵀ act(W h + b), with orthonormal rows of R (ReFT, table 17, row 3).

    The paper calls another formula DiReFT: that one is `NodireftIntervention`.
    """

    def edit(self, h: Tensor) -> Tensor:
        return (self.source(h) @ self.basis()).expand_as(h)


class LobireftIntervention(DireftIntervention):
    """LobiReFT: h' = h + Rᵀ b, a low-rank bias (ReFT, table 17)."""

    constant = True


class NodireftIntervention(DireftIntervention):
    """DiReFT as the paper defines it: h' = h + W₂ᵀ act(W₁ h + b), W₂ not orthonormal (ReFT, equation 4).

    With `add_bias`, W₂ has a bias that enters no formula, as in the original library.
    """

    orthonormal = False


INTERVENTIONS: dict[str, type[Intervention]] = {
    "loreft": LoreftIntervention,
    "noreft": NoreftIntervention,
    "consreft": ConsreftIntervention,
    "lobireft": LobireftIntervention,
    "direft": DireftIntervention,
    "nodireft": NodireftIntervention,
}


def intervention_class(name: str) -> type[Intervention]:
    """Return the class of a name such as `"loreft"` or `"LoreftIntervention"`; only our own table is looked at."""
    key = str(name).lower().removesuffix("intervention")
    if key not in INTERVENTIONS:
        raise ReftError(
            f"intervention: expected one of {', '.join(INTERVENTIONS)}, got {name!r}.{did_you_mean(key, INTERVENTIONS)}"
        )
    return INTERVENTIONS[key]
