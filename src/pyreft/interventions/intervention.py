"""What all edits share: small modules that map a hidden state h to h'.

Each sees only the gathered states of the tokens to edit, `[n, d]`. Which tokens these are, and where in a network, is
not known here.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from .pyvene import first_of_pair, in_our_shape, mask_of_directions


class Intervention(nn.Module):
    """h' = Φ(h), computed in float32 and cast back to the type of h.

    A subclass makes its parameters and gives the `formula`, or, where that is shorter, the `edit` that a formula
    adds to h. That is all that an intervention of one's own needs; pass the class to `ReftConfig(intervention=...)`
    and to whatever loads the adapter again.

    Args:
        embed_dim: d, the width of the edited hidden states.
        dropout: probability of dropout on the edit, h' - h, in training.

    Example:
        >>> class ScaleIntervention(Intervention):
        ...     def __init__(self, *, embed_dim, **settings):
        ...         super().__init__(embed_dim=embed_dim, **settings)
        ...         self.scale = nn.Parameter(torch.ones(embed_dim))
        ...
        ...     def formula(self, h):
        ...         return self.scale * h
        >>> ScaleIntervention(embed_dim=4)(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    #: whether the formula also takes `rows`, `[n]`: the row of the batch that each token belongs to
    by_row = False
    #: whether the formula also takes `x`, `[n, k]`: what the linear layer read of whose output h is. The class is then
    #: made with `input_dim`, k, beside `embed_dim`, and stands where a linear layer writes, see `places.components`
    reads_input = False
    #: whether the formula works as well on `[rows, n, d]` with the parameters of another intervention for each row,
    #: those of `[k]` as `[rows, 1, k]` and those of `[r, d]` as `[rows, r, d]`, see `stack`; a subclass says it itself
    stackable = False
    #: whether every new one is h' = h; a subclass says it itself
    begins_at_identity = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.stackable = vars(cls).get("stackable", False)  # a formula of one's own need not be what it inherits from

    def __init__(self, *, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.dropout = nn.Dropout(dropout)

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make another one like this, but for the width; a subclass adds its own."""
        return {"dropout": self.dropout.p}

    @classmethod
    def setting_names(cls) -> set[str]:
        """The keyword arguments that the class takes, but for the width and what only a program can give."""
        names: set[str] = set()
        for owner in cls.__mro__:
            if "__init__" in vars(owner):
                parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
                names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
                if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                    break
        return names - {"self", "embed_dim", "input_dim", "dtype", "device"}

    def _add_edit(self, h: Tensor, **context: Tensor) -> Tensor:
        return h + self.edit(h, **context)

    def _no_edit(self, h: Tensor, **context: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has neither a formula nor an edit.")

    #: from float32 states h, `[n, d]`, and what else it takes to h'
    formula: Callable[..., Tensor] = _add_edit
    #: instead of the formula, h' - h
    edit: Callable[..., Tensor] = _no_edit

    def basis(self) -> Tensor | None:
        """Return the directions along which h' differs from h, `[r, d]`, in float32; none if there are none."""
        return None

    @in_our_shape
    def forward(
        self,
        h: Tensor,
        source: None = None,
        subspaces: Any = None,
        *,
        R: Tensor | None = None,
        x: Tensor | None = None,
        **context: Tensor,
    ) -> Tensor:
        """Return h' for the states h, `[n, d]`, in the type of h.

        Args:
            source: of no use; pyvene's interventions take it here.
            subspaces: `[n, r]`, true for the directions that each token may move along. For states `[batch, n, d]`,
                a list of these directions for each row, as pyvene has them.
            R: the directions, `basis()`, where they have been computed already; a formula that has them takes them.
            x: what the linear layer read whose output h is, `[n, k]`; a formula that reads it takes it in float32.
            context: what else the formula takes.
        """
        if isinstance(subspaces, list):
            mask = mask_of_directions(subspaces, h, getattr(self, "low_rank_dimension", 0))
            if x is not None:
                context["x"] = x.flatten(0, -2)
            return Intervention.forward(self, h.flatten(0, -2), None, mask, R=R, **context).view_as(h)
        subspaces = None if isinstance(subspaces, dict) else subspaces  # for a class of one's own
        with torch.autocast(h.device.type, enabled=False):
            wide = h.float()
            if x is not None:
                context["x"] = x.float()
            R = self.basis() if R is None else R
            if R is not None:
                context["R"] = R if subspaces is None else R * subspaces[..., None]  # zero takes no part: [n, r, d]
            if R is not None and context["R"].dim() > h.dim():
                if x is not None:
                    context["x"] = context["x"][:, None]
                new = self.formula(wide[:, None], **context)[:, 0]
            else:
                new = self.formula(wide, **context)
            if self.training and self.dropout.p:
                new = wide + self.dropout(new - wide)
            return new.to(h.dtype)

    def __getitem__(self, index: int) -> "Intervention":
        return first_of_pair(self, index)

    def penalty(self) -> Tensor | None:
        """What the training loss gets on top after a forward, a scalar, or nothing."""
        return None

    def extra_repr(self) -> str:
        return str(self.embed_dim)


def stack(modules: Sequence[Any]) -> Any:
    """Return one intervention that edits row i of states `[rows, n, d]` with the i-th of these.

    They are of one `stackable` class, with the same settings and shapes. Gradients flow to each of them.
    """
    first = modules[0]
    made = copy.copy(first)
    for kind in ("_parameters", "_buffers"):
        made.__dict__[kind] = {
            name: value if value is None else _stack_tensors([getattr(module, name) for module in modules])
            for name, value in getattr(first, kind).items()
        }
    made.__dict__["_modules"] = {name: stack([getattr(module, name) for module in modules]) for name in first._modules}
    return made


def _stack_tensors(tensors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(tensors))
    return stacked.unsqueeze(1) if stacked.dim() == 2 else stacked


def check_rank(rank: int, embed_dim: int) -> None:
    """Refuse a rank below 1 or above the width."""
    if not isinstance(rank, int) or not 1 <= rank <= embed_dim:
        raise ReftError(
            f"expected a rank from 1 to the width {embed_dim} of the edited states, got {rank!r}.",
            setting="low_rank_dimension",
        )
