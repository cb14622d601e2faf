"""Every formula in one form, so that tokens with different adapters are edited in one product.

h' - h = Bᵀ act(A h + b) + s ⊙ h + t ⊙ swap(h) + c, where swap exchanges the two of each pair of dimensions; of LoRA it
is Bᵀ A x, where x is what the linear layer read that wrote h. Knows nothing of files, slots or tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import ReftError, did_you_mean
from ..interventions import JolaIntervention

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LowRank:
    """Bᵀ act(A h + b), with the activation `act` on the first `acted` of the r coordinates."""

    a: Tensor  # [r, d], or [r, k] if it acts on x
    b: Tensor  # [r]
    out: Tensor  # B, [r, d]
    act: str | None = None
    acted: int = 0


@dataclass(frozen=True)
class Vectors:
    """s ⊙ h + t ⊙ swap(h) + c, each `[d]`; a part that is not there is zero."""

    scale: Tensor | None = None
    turn: Tensor | None = None
    shift: Tensor | None = None


Edit = LowRank | Vectors


def _source(tensors: Tensors) -> tuple[Tensor, Tensor]:
    return tensors["learned_source.weight"], tensors["learned_source.bias"]


def _minus_basis(w: Tensor, b: Tensor, basis: Tensor, shift: Tensor | None, act: str | None) -> LowRank:
    """Bᵀ(act(W h + b) - B h - shift); with an activation the two terms are coordinates of their own."""
    shift = torch.zeros_like(b) if shift is None else shift
    if act is None:
        return LowRank(w - basis, b - shift, basis)
    return LowRank(torch.cat((w, -basis)), torch.cat((b, -shift)), torch.cat((basis, basis)), act, len(b))


def _plus(w: Tensor, b: Tensor, basis: Tensor, act: str | None) -> LowRank:
    return LowRank(w, b, basis, act, len(b) if act else 0)


def _road(tensors: Tensors) -> Vectors:
    cos, sin = (tensors["alpha"] * f(tensors["theta"]) for f in (torch.cos, torch.sin))
    return Vectors(scale=(cos - 1).repeat_interleave(2), turn=torch.stack((-sin, sin), dim=-1).flatten())


def _jola(tensors: Tensors) -> Vectors:
    gates = tensors["log_alpha"].sigmoid() * (JolaIntervention.HIGH - JolaIntervention.LOW) + JolaIntervention.LOW
    scaled, shifted = gates.clamp(0, 1)
    return Vectors(scale=scaled * tensors["scale"], shift=shifted * tensors["bias"])


# by the name of its class in configs and files: from the parameters, R as rows under "R", and the activation
_FORMS: dict[str, Callable[[Tensors, str | None], Edit]] = {
    "loreft": lambda t, act: _minus_basis(*_source(t), t["R"], None, act),
    "noreft": lambda t, act: _minus_basis(*_source(t), t["proj_layer.weight"], t.get("proj_layer.bias"), act),
    "consreft": lambda t, _: LowRank(-t["R"], t["learned_source"], t["R"]),
    "direft": lambda t, act: _plus(*_source(t), t["R"], act),
    "nodireft": lambda t, act: _plus(*_source(t), t["proj_layer.weight"], act),
    "lobireft": lambda t, _: LowRank(torch.zeros_like(t["R"]), t["learned_source"], t["R"]),
    "lora": lambda t, _: LowRank(t["A.weight"], torch.zeros(len(t["A.weight"])), t["scale"] * t["B.weight"].T),
    "red": lambda t, _: Vectors(scale=t["scale"] - 1, shift=t["bias"]),
    "bias": lambda t, _: Vectors(shift=t["bias"]),
    "lofit": lambda t, _: Vectors(scale=t["scale"]),
    "jola": lambda t, _: _jola(t),
    "road": lambda t, _: _road(t),
}
_RANKED = ("loreft", "noreft", "consreft", "direft", "nodireft", "lobireft", "lora")
_DOUBLED = ("loreft", "noreft")  # with an activation


def check_form(name: str, act: str | None) -> None:
    """Refuse, by its name, an intervention that does not have the form, or an activation that learns.

    Raises:
        ReftError: one of these.
    """
    if name not in _FORMS:
        raise ReftError(
            f"{name!r} cannot be served, since its edit of a token depends on more than that token's "
            f"state or is a formula of your own; served are {', '.join(_FORMS)}.{did_you_mean(name, _FORMS)}",
            setting="intervention",
        )
    if act is not None:
        activation(act)


def rank_of(name: str, rank: int | None, act: str | None) -> int:
    """How many coordinates the form needs: the rank, twice that of a difference with an activation in it, or 0."""
    if name not in _RANKED:
        return 0
    return (rank or 0) * (2 if act is not None and name in _DOUBLED else 1)


def affine(name: str, tensors: Tensors, act: str | None = None) -> Edit:
    """Return an intervention as an edit of the one form, float32.

    Args:
        name: of its class in configs and files.
        tensors: its parameters by their names, `rotate_layer.free` replaced by `R`, `[r, d]` with orthonormal rows;
            of LoRA also α/r, as `scale`.
        act: the name of its activation.

    Raises:
        ReftError: an intervention without this form.
    """
    check_form(name, act)
    edit = _FORMS[name]({key: value.float() for key, value in tensors.items()}, act)
    return replace(edit, act=None, acted=0) if isinstance(edit, LowRank) and not edit.acted else edit


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation of transformers by its name.

    Raises:
        ReftError: an unknown one, or one with parameters, which an adapter's file does not hold.
    """
    if name not in ACT2FN:
        raise ReftError(f"no activation is called {name!r}.{did_you_mean(name, ACT2FN)}", setting="act_fn")
    made: Any = ACT2FN[name]
    if isinstance(made, nn.Module) and any(True for _ in made.parameters()):
        raise ReftError(f"{name!r} has parameters of its own and cannot be served.", setting="act_fn")
    return made
