"""What holds of a base model now: looked at in each step, and worked out anew only where something has changed."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..places.structure import ancestors, path_of
from ..tuner.registry import Edits
from .anatomy import Structure, outside_of_edits
from .frozen import context_of, longest_plain_row, why_not_entered, why_not_frozen
from .parts import Parts
from .rows import NotExactError
from .tensors import Values

_UNSETTLED = 4  # so many new structures in as many steps are those of a model that changes in each


@dataclass(frozen=True)
class Seen:
    """What a step may rest on.

    Args:
        parts: the model.
        kept: how many blocks lie below the first edit.
        reason: why only what lies below the edits is frozen; none if all of the base model is.
        key: equal where the base model computes the same from the same numbers.
        anew: whether these numbers, or what cannot be compared, are others than at the look before.
        limit: see `longest_plain_row`.
        context: see `context_of`.
    """

    parts: Parts
    kept: int
    reason: str | None
    key: str
    anew: bool
    limit: int | None
    context: int


class Watch:
    """Sees when a base model changes.

    Args:
        base: the model.
        outer: it, or what another kind of adapter has put around it.
        edits: of the model.
        prints: whether to tell the model from others in later runs.
    """

    def __init__(self, base: Any, outer: nn.Module, edits: Edits, prints: bool) -> None:
        self._base, self._outer, self._edits, self._prints = base, outer, edits, prints
        self.parts = Parts(base, outer, edits)
        self._print = ""  # a digest of the base model, by which files tell it from others
        self._structure: Structure | None = None
        self._values: Values | None = None
        self._frozen: dict[int, tuple[str | None, list[nn.Module]]] = {}  # by the number of blocks below the edits
        self._codes = 0  # how often what cannot be compared has changed
        self._known: set[tuple[str, int]] = set()
        self._new = 0  # structures that were not there before, one step after the other
        self._anew = False
        self._checkpointed: list[nn.Module] = []
        self._limit: int | None = None
        self._context = 0

    def look(self, places: Iterable[tuple[nn.Module, str]]) -> Seen:
        """Look at the model.

        Args:
            places: where it is edited now, see `Blocks.below`.

        Raises:
            NotExactError: parts of a forward would differ when they are computed apart.
        """
        self._anew = self._look_at_structure() or self._anew  # also if what follows is no step
        assert self._structure is not None
        if self._new >= _UNSETTLED:
            raise NotExactError("modules of the base model change from step to step")
        if torch.is_grad_enabled() and any(module.training for module in self._checkpointed):
            raise NotExactError("gradient checkpointing recomputes whole blocks; turned off, less memory is needed")
        kept = self.parts.blocks.below(places)
        if kept not in self._frozen:
            self._frozen[kept] = self._find_frozen(kept)
        reason, modules = self._frozen[kept]
        if not modules:
            raise NotExactError(reason)
        anew, self._anew = self._look_at_values(modules) or self._anew, False
        key = f"{self._print} {self._structure.facts} {self._codes} {kept}"
        return Seen(self.parts, kept, reason, key, anew, self._limit, self._context)

    def new_epoch(self) -> None:
        """Tell that the numbers are to be looked at to the bit."""
        if self._values is not None and not self._values.is_same_to_the_bit():
            self._values = None

    def _look_at_structure(self) -> bool:
        """Return whether something has changed that cannot be compared."""
        before = self._structure
        if before is not None and before.is_same():
            self._new = 0
            return False
        now = self._structure = Structure(self._outer)
        self._frozen.clear()
        self._checkpointed = [module for module in now.modules if getattr(module, "gradient_checkpointing", False)]
        config = self._base.config
        self._limit = longest_plain_row(config)
        self._context = min(context_of(config.get_text_config()), self._limit or sys.maxsize)
        moved = before is not None and before.modules != now.modules
        other = before is not None and not now.has_objects_of(before)
        self._codes += other
        if moved or other:
            self.parts = Parts(self._base, self._outer, self._edits)
        state = now.facts, self._codes
        self._new = 0 if state in self._known or before is None else self._new + 1
        self._known.add(state)
        return moved or other

    def _look_at_values(self, modules: list[nn.Module]) -> bool:
        """Return whether the numbers are others than before."""
        values = self._values
        if values is not None and values.modules is not modules and values.are(modules):
            values.modules = modules
        if values is not None and values.modules is modules and values.is_same():
            return False
        self._values = Values(modules)
        if self._prints:
            self._print = self._values.fingerprint()
        return True

    def _find_frozen(self, kept: int) -> tuple[str | None, list[nn.Module]]:
        """Why not all modules are frozen, if not, and those that a step may rest on; none if it may not."""
        assert self._structure is not None
        modules, config = self._structure.modules, self._base.config
        reason = why_not_frozen(modules, config)
        if reason is None:
            return None, modules
        backbone, above = self.parts.backbone, self.parts.blocks.modules_from(kept)
        below = [module for module in outside_of_edits(backbone) if module not in above]
        around = list(ancestors(self._outer, path_of(self._outer, backbone)))[1:]
        if not kept or why_not_frozen(below, config) or why_not_entered(around):
            return reason, []
        return reason, below
