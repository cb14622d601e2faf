"""Interventions in pyvene's shape, `forward(base, source, subspaces)`: the classes to subclass, and how they are asked.

Users of the original wrote their own in this shape, by subclassing these classes of pyvene's, or one of the six
formulas. A `forward` that takes a `source` is asked so, whatever it belongs to; everything else knows our shape alone.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError

_PLAIN = (bool, int, float, str, type(None))
_PYVENES = (
    *("init_orth", "keep_last_dim", "use_fast", "layer", "component", "unit", "max_number_of_units", "intervention"),
    *("intervention_type", "subspace_partition", "group_key", "intervention_link_key", "moe_key"),
    *("source_representation", "hidden_source_representation", "latent_dim"),
)


class PyveneIntervention(nn.Module):
    """What pyvene calls `Intervention`: takes whatever arguments there are, and keeps the few that matter.

    A subclass defines `forward(base, source=None, subspaces=None)` and returns h' for the states `base`, which are
    `[batch, positions, d]` with `keep_last_dim=True`, and `[batch, positions * d]` without.

    Args:
        embed_dim: d, the width of the edited hidden states.
        keep_last_dim: see above.
        kwargs: what a subclass asks for; plain values are saved with the adapter, to make it again.
    """

    trainable = is_source_constant = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.embed_dim = self.interchange_dim = kwargs.get("embed_dim")
        self.keep_last_dim = kwargs.get("keep_last_dim", False)
        self.use_fast, self.subspace_partition = kwargs.get("use_fast", False), kwargs.get("subspace_partition")
        own = ("embed_dim", "keep_last_dim", "use_fast")
        self.settings = {key: value for key, value in kwargs.items() if isinstance(value, _PLAIN) and key not in own}

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Any:
        """Return h'."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(base, source=None, subspaces=None).")

    def __getitem__(self, index: int) -> "PyveneIntervention":
        return first_of_pair(self, index)


class TrainableIntervention(PyveneIntervention):
    """One with parameters."""

    trainable = True


class SourcelessIntervention(PyveneIntervention):
    """One that takes nothing from another input, as all of ReFT."""

    is_source_constant = True


class ConstantSourceIntervention(SourcelessIntervention):
    """The same, by an earlier name."""


class DistributedRepresentationIntervention(nn.Module):
    """One whose directions are not those of single numbers."""

    is_repr_distributed = True


class LocalistRepresentationIntervention(nn.Module):
    """One of single numbers; it always sees `[batch, positions, d]`."""

    is_repr_distributed = False


def settings_of(module: Any) -> dict[str, Any]:
    """The keyword arguments that make another module like this, as far as it says them."""
    found = getattr(module, "settings", None)
    return found if isinstance(found, dict) else {}


def first_of_pair(module: Any, index: int) -> Any:
    """The pair of an intervention and its hook that an earlier pyvene gave; of it, what `[0]` is."""
    if index != 0:
        raise IndexError(f"an intervention stands for a pair of which only [0] is left, got [{index}].")
    return module


def speaks_pyvene(module: Any) -> bool:
    """Whether a module, or a class, is asked as pyvene asks; `forward` may have been replaced since it was made."""
    if not isinstance(module, type) and "forward" in module.__dict__:
        return _takes_source(module.__dict__["forward"])
    cls: Any = module if isinstance(module, type) else type(module)
    return _takes_source(cls.forward)


def in_our_shape(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a `forward` that takes a source for those who give one, and is not asked so."""
    forward.in_our_shape = True  # type: ignore[attr-defined]
    return forward


@functools.lru_cache(maxsize=1024)
def _takes_source(forward: Callable[..., Any]) -> bool:
    return not hasattr(forward, "in_our_shape") and "source" in inspect.signature(forward).parameters


class Asked:
    """A module in pyvene's shape, called as the interventions here are.

    The tokens `[n, d]` are put into rows, `[batch, positions, d]`, with the rows that have any, in their order; one
    that has fewer positions than others repeats its last one. The states come in the type of the base model, or in
    that of the module's parameters if none of them has it.

    Args:
        module: with `forward(base, source, subspaces)`.
    """

    by_row = True

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, h: Tensor, *, rows: Tensor, subspaces: Any = None, **context: Any) -> Tensor:
        """Return h' for the states h, `[n, d]`, in the type of h.

        Args:
            rows: `[n]`, the row of the batch that each token belongs to, ascending.
            subspaces: whatever the call gave, a list with an entry for each row of the batch.
            context: of no use here.
        """
        found, counts = torch.unique_consecutive(rows, return_counts=True)
        at = torch.arange(int(counts.max()), device=h.device)
        first, valid = counts.cumsum(0) - counts, at < counts[:, None]
        base = h[first[:, None] + at.minimum(counts[:, None] - 1)].to(_type(self.module, h.dtype))
        if isinstance(subspaces, list):
            subspaces = [subspaces[row] for row in found.tolist()]
        apart = _keeps_last_dim(self.module)
        try:
            new = self.module(base if apart else base.flatten(1), None, subspaces)
        except (AttributeError, TypeError) as error:
            if "NoneType" not in str(error) or getattr(self.module, "is_source_constant", False):
                raise
            raise ReftError(
                f"{type(self.module).__name__}: {error}. If it reads a source, the states of another input, an edit "
                "has none, and its forward(base, source=None, subspaces=None) has to do with the base alone."
            ) from error
        new = getattr(new, "output", new)
        return new.view_as(base)[valid].to(h.dtype)


def mask_of_directions(subspaces: list[Any], h: Tensor, rank: int) -> Tensor:
    """Directions by row of states `[batch, positions, d]`, as pyvene has them, as a mask `[batch * positions, r]`."""
    mask = torch.zeros(len(subspaces), rank, dtype=torch.bool)
    for row, chosen in enumerate(subspaces):
        mask[row, list(range(rank) if chosen is None else chosen)] = True
    return mask.to(h.device).repeat_interleave(h.shape[:-1].numel() // len(subspaces), dim=0)


def take_further(cls: type, further: dict[str, Any]) -> dict[str, Any]:
    """What a class is given beside its own arguments: what pyvene's classes take, or what a subclass asks for.

    Returns:
        The plain values that a subclass asks for, which make it again.

    Raises:
        ReftError: a class of this library asks for nothing else.
    """
    unknown = [name for name in further if name not in _PYVENES]
    if unknown and cls.__module__.partition(".")[0] == __package__.partition(".")[0]:
        raise ReftError(f"{cls.__name__} does not take it.", setting=unknown[0])
    return {name: further[name] for name in unknown if isinstance(further[name], _PLAIN)}


def _keeps_last_dim(module: Any) -> bool:
    """Whether a module sees positions apart; those of this library do, which pyvene's other attributes do not tell."""
    if getattr(module, "keep_last_dim", True):
        return True
    return not getattr(module, "is_repr_distributed", True)


def _type(module: nn.Module, states: torch.dtype) -> torch.dtype:
    own = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    return states if states in own or not own else own[0]


class LowRankRotateLayer(nn.Module):
    """The original's class of this name: a matrix `weight`, `[n, m]`, for torch's `orthogonal` to keep orthonormal.

    Args:
        init_orth: begin with orthonormal columns.
    """

    def __init__(self, n: int, m: int, init_orth: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, m))
        if init_orth and not self.weight.is_meta:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight
