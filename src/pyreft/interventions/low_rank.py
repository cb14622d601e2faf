"""The six formulas of ReFT (arXiv 2404.03592): equations 3 and 4 and table 17."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import ReftError, did_you_mean
from .intervention import Intervention, check_rank
from .original_names import State, named_as_here, named_as_there
from .pyvene import take_further
from .rotation import OrthonormalColumns


class LowRankIntervention(Intervention):
    """h' differs from h along r directions: the rows of R, `[r, d]`, which are orthonormal, or those of W₂.

    A subclass makes its parameters, says what its directions are, and gives the formula.

    Args:
        embed_dim: d, the width of the edited hidden states.
        low_rank_dimension: r, the rank of the edit, at most d.
        dropout: probability of dropout on the edit, h' - h, in training.
        act_fn: name of an activation of transformers (`"relu"`, `"gelu"`, ...); none is the identity.
        add_bias: give the projection W₂ of `NoreftIntervention` and `NodireftIntervention` a bias.
        init: how training begins: `"random"`, as the original does, or `"identity"`, at h' = h.
        dtype: type of the parameters, float32 if not given.
        device: where to put the parameters.
        further: what pyvene's classes take, to no effect; and what the class of a user asks for beside.

    Raises:
        ReftError: a rank below 1 or above the width, an unknown activation, or a formula that is h' = h for no
            parameters that are known here.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        init: str = "random",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **further: Any,
    ) -> None:
        super().__init__(embed_dim=embed_dim, dropout=dropout)
        check_rank(low_rank_dimension, embed_dim)
        if act_fn is not None and act_fn not in ACT2FN:
            raise ReftError(f"no activation is called {act_fn!r}.{did_you_mean(act_fn, ACT2FN)}", setting="act_fn")
        self.low_rank_dimension = low_rank_dimension
        self.act_fn_name = act_fn
        self.add_bias = add_bias
        self._further = take_further(type(self), further)
        self.act_fn = nn.Identity() if act_fn is None else ACT2FN[act_fn]
        self.make_parameters(embed_dim, low_rank_dimension)
        if init not in ("random", "identity"):
            raise ReftError(f"expected 'random' or 'identity', got {init!r}.", setting="init")
        self.init = init
        if init == "identity":
            with torch.no_grad():
                self.begin_at_identity()
        self.to(device=device, dtype=dtype)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "low_rank_dimension": self.low_rank_dimension,
            "act_fn": self.act_fn_name,
            "add_bias": self.add_bias,
            **({} if self.init == "random" else {"init": self.init}),
            **self._further,
        }

    learned_source: Any  # W and b as a linear layer, or b alone

    def make_parameters(self, d: int, r: int) -> None:
        """Make what is learned."""
        raise NotImplementedError

    def begin_at_identity(self) -> None:
        """Set the parameters so that h' = h."""
        raise ReftError(f"{type(self).__name__} is h' = h for no parameters.", setting="init")

    def _begin_with(self, weight: Tensor) -> None:
        """Begin with this W, and b = 0."""
        if self.act_fn_name is not None:
            raise ReftError(f"with an activation, {type(self).__name__} is h' = h for no parameters.", setting="init")
        self.learned_source.weight.copy_(weight)
        self.learned_source.bias.zero_()

    def source(self, h: Tensor) -> Tensor:
        """Return act(W h + b), `[n, r]`."""
        return self.act_fn(linear(self.learned_source, h))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; that of an intervention alone answers to the original's names, too."""
        found = super().state_dict(*args, **kwargs)
        return found if args or kwargs.get("destination") is not None else State(found)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """As of any module; tensors by the original's names are taken, too."""
        own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        own = {name: tensor for name, tensor in own.items() if name not in self._buffers}  # those of a subclass
        if named_as_there(own):
            for name in own:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: tensor for name, tensor in named_as_here(own).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, rank={self.low_rank_dimension}"


def linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """A linear layer in float32, whatever type its parameters have; it may be stacked."""
    product = h @ layer.weight.float().mT
    return product if layer.bias is None else product + layer.bias.float()


class LoreftIntervention(LowRankIntervention):
    """LoReFT: h' = h + Rᵀ(act(W h + b) - R h), with orthonormal rows of R (ReFT, equation 3)."""

    stackable = True

    def make_parameters(self, d: int, r: int) -> None:
        self.rotate_layer = OrthonormalColumns(d, r)
        self.learned_source = nn.Linear(d, r, dtype=torch.float32)

    def basis(self) -> Tensor:
        return self.rotate_layer.weight.mT

    def begin_at_identity(self) -> None:
        self._begin_with(self.basis())  # W = R

    def formula(self, h: Tensor, R: Tensor) -> Tensor:
        return h + (self.source(h) - h @ R.mT) @ R


class NoreftIntervention(LowRankIntervention):
    """NoReFT: h' = h + W₂ᵀ(act(W₁ h + b) - W₂ h), W₂ not orthonormal (ReFT, table 17)."""

    stackable = True

    def make_parameters(self, d: int, r: int) -> None:
        self.proj_layer = nn.Linear(d, r, bias=self.add_bias, dtype=torch.float32)  # W₂
        self.learned_source = nn.Linear(d, r, dtype=torch.float32)  # W₁, b

    def basis(self) -> Tensor:
        return self.proj_layer.weight.float()

    def begin_at_identity(self) -> None:
        self._begin_with(self.proj_layer.weight)  # W₁ = W₂
        if self.proj_layer.bias is not None:
            self.proj_layer.bias.zero_()

    def formula(self, h: Tensor, R: Tensor) -> Tensor:
        return h + (self.source(h) - linear(self.proj_layer, h)) @ R


class ConsreftIntervention(LoreftIntervention):
    """ConsReFT: h' = h + Rᵀ(b - R h), the same r coordinates for every token (ReFT, table 17)."""

    stackable = True

    def make_parameters(self, d: int, r: int) -> None:
        self.rotate_layer = OrthonormalColumns(d, r)
        self.learned_source = nn.Parameter(torch.rand(r, dtype=torch.float32))

    def begin_at_identity(self) -> None:
        LowRankIntervention.begin_at_identity(self)

    def formula(self, h: Tensor, R: Tensor) -> Tensor:
        return h + (self.learned_source.float() - h @ R.mT) @ R


class DireftIntervention(LoreftIntervention):
    """h' = h + Rᵀ act(W h + b), with orthonormal rows of R (ReFT, table 17, row 3).

    The paper calls another formula DiReFT: that one is `NodireftIntervention`.
    """

    stackable = True

    def begin_at_identity(self) -> None:
        if self.act_fn(torch.zeros(1, device="cpu")).item() != 0:
            LowRankIntervention.begin_at_identity(self)
        self.learned_source.weight.zero_()
        self.learned_source.bias.zero_()

    def formula(self, h: Tensor, R: Tensor) -> Tensor:
        return h + self.source(h) @ R


class LobireftIntervention(ConsreftIntervention):
    """LobiReFT: h' = h + Rᵀ b, a low-rank bias (ReFT, table 17)."""

    stackable = True

    def begin_at_identity(self) -> None:
        self.learned_source.zero_()

    def formula(self, h: Tensor, R: Tensor) -> Tensor:
        return h + self.learned_source.float() @ R


class NodireftIntervention(NoreftIntervention):
    """DiReFT as the paper defines it: h' = h + W₂ᵀ act(W₁ h + b), W₂ not orthonormal (ReFT, equation 4).

    With `add_bias`, W₂ has a bias that enters no formula, as in the original library; its gradient is zero.
    """

    stackable = True

    def begin_at_identity(self) -> None:
        self.proj_layer.weight.zero_()  # W₂ = 0, as B of a LoRA

    def formula(self, h: Tensor, R: Tensor) -> Tensor:
        new = h + self.source(h) @ R
        return new if self.proj_layer.bias is None else new + 0 * self.proj_layer.bias.sum()
