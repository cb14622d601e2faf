"""Whether a way to compute a step in part is exact for a model: a few rows tell, beside the ordinary step.

A way is tried on a few tokens when it is first thought of, and again on longer rows whenever a batch has more columns
than were tried so far. What a model does only from some column or position on shows there.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..positions import IGNORED
from ..tuner.adapted import evaluating
from ..tuner.registry import Edits
from . import trials
from .arguments import COUNT, FUSED
from .layers import SkipLayers
from .parts import Parts
from .prefixes import SkipPrefixes
from .rows import NotExactError
from .store import Store

Way = SkipPrefixes | SkipLayers
Ordinary = Callable[..., Any]

_MARGIN = 8  # positions at the end of a model's table that are tried only if a batch comes to them
_UNLIKE = (  # what models may raise that cannot be run in parts, or not with so many columns
    NotExactError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class _Tried:
    """How many columns a way was found exact for, from how many on it is not, and why."""

    proven: int = 0
    refused: float = math.inf
    why: str = ""


class Probe:
    """Tries ways beside the ordinary step, without randomness.

    A base model in float32 is tried in float32, even if it is trained in mixed precision.

    Args:
        parts: of the base model.
        edits: of the model.
    """

    def __init__(self, parts: Parts, edits: Edits) -> None:
        self._edits, self._base = edits, parts.base
        self._keeps = "logits_to_keep" in inspect.signature(parts.base.forward).parameters
        self._tried: dict[Way, _Tried] = {}

    def proven(self, way: Way) -> int:
        """For how many columns a way is known to be exact."""
        return self._tried[way].proven

    def why_not(self, way: Way) -> str:
        """Why a way was not allowed."""
        return self._tried[way].why

    def allows(self, way: Way, call: dict[str, Any], ordinary: Ordinary, columns: int, context: int) -> bool:
        """Whether a way is exact in batches of so many columns or positions; tried if it is not known.

        Args:
            call: a batch; of its rows some are tried.
            ordinary: the ordinary step.
            columns: no more than the batch or the context has.
            context: how many positions the model has; 0 if it does not say it.

        Raises:
            NotExactError: a batch that tells nothing of the model.
        """
        tried = self._tried.setdefault(way, _Tried())
        if columns <= tried.proven:
            return True
        if columns >= tried.refused:
            return False
        with self._quietly(call["input_ids"].device):
            if isinstance(way, SkipLayers):
                self._try(tried, columns, lambda: self._apart_in_layers(way, call, ordinary))
                return columns <= tried.proven
            counted = way.tokens, way.computed
            sample = self._sample(way, call)
            if not tried.proven:
                self._try(tried, 0, lambda: self._apart_at_first(way, call, ordinary, sample, max(columns, context)))
            for size in dict.fromkeys((_rounded(columns, context), columns)):
                if tried.proven < columns and size < tried.refused:
                    batches = trials.long(sample, size, context)
                    self._try(tried, size, functools.partial(self._apart_in_prefixes, way, ordinary, batches))
            way.tokens, way.computed = counted
        return columns <= tried.proven

    def _try(self, tried: _Tried, columns: int, distance: Callable[[], float]) -> None:
        try:
            exact = distance() <= self._tolerance()
            why = f"parts of {type(self._base).__name__} computed apart differ from the whole"
        except _UNLIKE as error:  # a model that cannot be run in parts, or not with so many columns
            exact, why = False, str(error)
        if exact:
            tried.proven = max(tried.proven, columns)
        else:
            tried.refused = columns
            tried.why = f"{why}, in rows of {columns} columns" if tried.proven else why

    def _tolerance(self) -> float:
        """What rounding may make of a tensor, relative to it; structural differences are far larger."""
        return max(8 * torch.finfo(self._base.dtype).eps, 1e-4)

    # -- without layers -------------------------------------------------------------------------------------------

    def _apart_in_layers(self, way: SkipLayers, call: dict[str, Any], ordinary: Ordinary) -> float:
        """How far what the model returns is, when the states below are computed and when they are held."""
        few = trials.whole(call)
        store = Store(1 << 62)
        expected = ordinary(**few)
        found = [way(few, way.plan(few), store) for _ in range(2)]
        return max(_distance(one, expected, ("logits",)) for one in found)

    # -- without prefixes -----------------------------------------------------------------------------------------

    def _sample(self, way: SkipPrefixes, call: dict[str, Any]) -> trials.Sample:
        plan = way.plan(call)
        edited = torch.stack(list(plan.located.masks.values())).any(0)
        count = max(len(self._edits.rules[name]) for name in self._edits.active)
        return trials.Sample.of(call["input_ids"], edited, plan.rows, count)

    def _apart_at_first(
        self, way: SkipPrefixes, call: dict[str, Any], ordinary: Ordinary, sample: trials.Sample, columns: int
    ) -> float:
        """How far a few tokens are: their logits, counted as is better, and what the call returns."""
        far, near = trials.far(sample, columns), trials.near(sample)
        distance = self._counted(way, [(batch, ordinary(**batch), None) for batch in (far, near)])
        near |= {name: call[name] for name in (FUSED, COUNT) if call.get(name) is not None}
        output = way(near, way.plan(near), Store(0))
        return max(distance, _distance(output, ordinary(**near), ("loss",)))  # a model may have a loss of its own

    def _apart_in_prefixes(self, way: SkipPrefixes, ordinary: Ordinary, batches: list[dict[str, Any]]) -> float:
        """How far the logits of a few tokens in long rows are."""
        pairs: list[tuple[dict[str, Any], Any, Tensor | None]] = []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            asked = (batch["labels"][:, 1:] != IGNORED).any(0).nonzero()[:, 0] if self._keeps else None
            if asked is not None:
                inputs["logits_to_keep"] = asked
            pairs.append((batch, ordinary(**inputs), asked))
        return self._counted(way, pairs)

    def _counted(self, way: SkipPrefixes, pairs: list[tuple[dict[str, Any], Any, Tensor | None]]) -> float:
        """How far logits are, with positions counted as the model does: `way.offsets` is set to it.

        Where a row's padding changes them only in a rounding, as with rotary positions, they are counted without it:
        then what is held serves the row in any batch.
        """
        before, way.offsets = way.offsets, False
        plain = max((_distance_of_logits(way, *pair) for pair in pairs), default=0.0)
        if plain <= max(2 * torch.finfo(self._base.dtype).eps, 1e-4):
            return plain
        way.offsets = True
        offset = max(_distance_of_logits(way, *pair) for pair in pairs)
        way.offsets = plain > 4 * offset if min(plain, offset) <= self._tolerance() else before
        return min(plain, offset)

    @contextmanager
    def _quietly(self, device: torch.device) -> Iterator[None]:
        """Without gradients and chance; the training then draws as if nothing had been tried."""
        mixed = torch.is_autocast_enabled(device.type) and self._base.dtype != torch.float32
        with (
            torch.no_grad(),
            evaluating(self._edits.layers),
            torch.autocast(device.type, enabled=mixed),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            yield


def _rounded(columns: int, context: int) -> int:
    """The next of the sizes 16, 24, 32, 48, 64, …, so that few are tried; itself, if these positions may not be."""
    size = 16
    while size < columns:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if size <= context - _MARGIN else columns


def _distance_of_logits(way: SkipPrefixes, call: dict[str, Any], expected: Any, asked: Tensor | None) -> float:
    """How far the logits of tokens with labels are, when their states are computed and when they are held.

    Args:
        asked: the columns for which there are logits; none for all of them.
    """
    store = Store(1 << 62)
    found = []
    for _ in range(2):
        hidden, _, (rows, columns) = way.final(call, way.plan(call), store)
        at = columns if asked is None else torch.searchsorted(asked, columns)
        # what all logits of a token have in common would hide how they differ
        logits = (each - each.mean(-1, keepdim=True) for each in (way.parts.logits(hidden), expected.logits[rows, at]))
        found.append(_apart(*logits))
    return max(found)


def _distance(found: Any, expected: Any, names: Sequence[str]) -> float:
    """How far the named values of two outputs are, and what TRL's fused head gives for tokens with labels."""
    if getattr(expected, "logits", None) is None:
        names = [name for name, value in expected.items() if value.is_floating_point()]
    return max(_apart(found[name], expected[name]) for name in names)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors, relative to the second; infinite where a number is none."""
    found, expected = found.float(), expected.float()
    distance = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return math.inf if math.isnan(distance) else distance
