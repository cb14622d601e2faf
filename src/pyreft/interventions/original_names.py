"""What the original calls the tensors of the six formulas, in its files and its `state_dict`s, in our names."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..errors import ReftError
from .rotation import orthonormal_columns

SIZES = ("embed_dim", "interchange_dim")  # stored beside the parameters, which say it themselves
_NAMES = {  # LoReFT's tensors, stored under names of their own
    "weight": "learned_source.weight",
    "bias": "learned_source.bias",
    "rotate_layer": "rotate_layer.free",
}
_PARAMETRIZED = "rotate_layer.parametrizations.weight."


class State(OrderedDict):
    """The `state_dict` of an intervention, which also answers to the original's names of LoReFT's tensors.

    It is stored as a plain dict, so a file of it can be read with `weights_only=True`.
    """

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(_NAMES.get(str(name)))

    def get(self, name: str, default: Any = None) -> Any:
        with suppress(KeyError):
            return self[name]
        return default

    def __missing__(self, name: str) -> Tensor:
        if _NAMES.get(name) not in self:
            raise KeyError(name)
        tensor = self[_NAMES[name]]
        return orthonormal_columns(tensor) if name == "rotate_layer" else tensor

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)


# for functions of torch.func, which take dicts of some classes alone
register_pytree_node(
    State, lambda state: ([*state.values()], [*state]), lambda values, names: State(zip(names, values, strict=True))
)


def named_as_there(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of an intervention have the original's names where ours are others."""
    return any(name in state for name in (*SIZES, "rotate_layer", f"{_PARAMETRIZED}original"))


def named_as_here(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an intervention of the original by the names that they have here.

    Raises:
        ReftError: R is stored in two parts that do not fit each other.
    """
    here = {_NAMES.get(name, name): tensor for name, tensor in state.items() if name not in SIZES}
    if (free := here.pop(f"{_PARAMETRIZED}original", None)) is not None:
        base = here.pop(f"{_PARAMETRIZED}0.base", None)
        if base is None or free.dim() != 2 or base.shape != (len(free), len(free)) or free.shape[1] > len(free):
            raise ReftError("the two parts of rotate_layer do not fit each other.")
        here["rotate_layer.free"] = base.float() @ _orthogonal(free.float())
    return here


def _orthogonal(free: Tensor) -> Tensor:
    """The matrix `[d, r]` that torch's `orthogonal` parametrization makes of its parameter, before its base."""
    if free.shape[0] == free.shape[1]:
        lower = free.tril()
        return torch.matrix_exp(lower - lower.T)
    reflectors = free.tril(-1)
    tau = 2 / (1 + reflectors.square().sum(0))
    return torch.linalg.householder_product(reflectors, tau) * free.diagonal().int()
