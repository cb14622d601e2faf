"""Which tokens of a step are edited, with whose weights: from rows, positions and adapters to flat indices and slots.

A step of an engine computes some tokens of each row of its batch: those of row i are `starts[i]` to `starts[i + 1]` of
one flat list, the first of them being token `computed[i]` of its request. Knows nothing of formulas, files or engines.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ReftError
from ..positions import Positions

Spans = tuple[tuple[int, int | None], ...]  # from token a to before token b; none is endless


class Place(NamedTuple):
    """Where an edit stands."""

    layer: int  # behind this block, or in it; -1 is before the first
    stage: int  # its turn among the edits there
    part: str = ""  # the component that a linear layer of the block writes; empty between blocks


def by_layer(places: Iterable[Place]) -> dict[int, list[Place]]:
    """The edited places behind each block, in their order."""
    found: dict[int, list[Place]] = {}
    for place in sorted(place for place in places if not place.part):
        found.setdefault(place.layer, []).append(place)
    return found


def by_part(places: Iterable[Place]) -> dict[tuple[int, str], list[Place]]:
    """The edited places inside of blocks, by block and part, in their order."""
    found: dict[tuple[int, str], list[Place]] = {}
    for place in sorted(place for place in places if place.part):
        found.setdefault((place.layer, place.part), []).append(place)
    return found


Pattern = Mapping[Place, int]  # an adapter's edited places, each with the number of its rule


def rule_spans(rule: Positions, prompt: int) -> Spans:
    """Return the located tokens of a request with so many tokens in its prompt, as spans that do not touch.

    They are those of `Positions.locate`, and for `all` those that are generated, too.

    Raises:
        ReftError: a rule of one's own, which is a program that an adapter's files do not hold.
    """
    if rule.own:
        raise ReftError(f"the rule {rule.own!r} of your own cannot be served.", setting="positions")
    if rule.whole:
        return ((0, None if rule.endless else prompt),) if prompt or rule.endless else ()
    first, last = rule.first, rule.last
    if first and last:
        first, last = min(first, prompt // 2), min(last, prompt // 2)
    prefix = (0, min(first, prompt)) if rule.side != "suffix" else (0, 0)
    suffix = (max(prompt - last, 0), prompt) if rule.side != "prefix" else (0, 0)
    found = [span for span in (prefix, suffix) if span[1] > span[0]]
    if len(found) == 2 and found[1][0] <= found[0][1]:
        found = [(found[0][0], found[1][1])]
    return tuple(found)


class Row:
    """A request in the batch.

    Args:
        slot: of its adapter in the bank.
        pattern: the adapter's edited places; the same object for adapters that are alike in it, see `same`.
        rules: the adapter's rules, by number.
        prompt: how many tokens its prompt has.
        strength: by which each edit is multiplied.
    """

    __slots__ = ("end", "pattern", "slot", "spans", "strength")

    def __init__(
        self, slot: int, pattern: Pattern, rules: Sequence[Positions], prompt: int, strength: float = 1.0
    ) -> None:
        self.slot, self.pattern, self.strength = slot, pattern, strength
        self.spans = tuple(rule_spans(rule, prompt) for rule in rules)
        ends = [b for spans in self.spans for _, b in spans]
        self.end = None if None in ends else max([0, *(b for b in ends if b is not None)])


_PATTERNS: dict[tuple, Pattern] = {}


def same(pattern: Pattern) -> Pattern:
    """Return the one object for all equal patterns, so that a step compares them by identity."""
    return _PATTERNS.setdefault(tuple(sorted(pattern.items())), pattern)


class Tile(NamedTuple):
    """Located tokens as a table, all of a line with the weights of one slot."""

    slots: Tensor | slice  # [lines]; a slice if they follow each other, so that no weights are copied
    at: Tensor  # [lines, width], flat; filled up with the line's first where a line has fewer
    valid: Tensor | None  # [lines, width], false for what fills up; none if nothing does
    strength: Tensor | None  # [lines, width, 1]; none if all are 1

    def to(self, device: torch.device) -> "Tile":
        """The same on a device."""
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)
        return Tile(*moved)  # type: ignore[arg-type]  # none and slices stay


class Tokens(NamedTuple):
    """The located tokens of a step at one place, each once, those of a slot together."""

    at: np.ndarray  # [n], flat
    slots: np.ndarray  # [n]
    strength: np.ndarray  # [n], float32

    def tiles(self, width: int = 16) -> list[Tile]:
        """Return them as tables: one for slots with a single token, and one in lines of at most `width` for others.

        A line's weights are read once for all its tokens, and what fills up is at most `width - 1` for each slot.
        """
        _, first, counts = np.unique(self.slots, return_index=True, return_counts=True)
        found = []
        single = first[counts == 1]
        if len(single):
            found.append(self._tile(single[:, None], None))
        many = counts > 1
        if many.any():
            width = min(width, int(counts.max()))
            lines = -(-counts[many] // width)
            line = np.arange(lines.sum()) - np.repeat(lines.cumsum() - lines, lines)  # its number within its slot
            number = np.repeat(first[many], lines)[:, None] + line[:, None] * width + np.arange(width)
            valid = number < np.repeat(first[many] + counts[many], lines)[:, None]
            found.append(self._tile(np.where(valid, number, number[:, :1]), None if valid.all() else valid))
        return found

    def _tile(self, number: np.ndarray, valid: np.ndarray | None) -> Tile:
        strength = None if (self.strength == 1).all() else torch.from_numpy(self.strength[number])[..., None]
        slots = self.slots[number[:, 0]]
        first, follow = int(slots[0]), bool((np.diff(slots) == 1).all())
        return Tile(
            slice(first, first + len(slots)) if follow else torch.from_numpy(slots),
            torch.from_numpy(self.at[number]),
            None if valid is None else torch.from_numpy(valid),
            strength,
        )


class Step:
    """The located tokens of a step, by place. Made by `plan`."""

    def __init__(self, active: list[tuple[Row, int, int, int]]) -> None:
        self._active = active  # rows, each with its first flat index, its first token and how many it computes
        self._patterns = list({id(row.pattern): row.pattern for row, *_ in active}.values())
        self._known: dict[tuple, Tokens | None] = {}
        self._tiles: dict[tuple, list[Tile]] = {}

    def key(self, place: Place) -> tuple[int | None, ...]:
        """What decides which tokens are located at a place: places with equal keys share them."""
        return tuple(pattern.get(place) for pattern in self._patterns)

    def at(self, place: Place) -> Tokens | None:
        """The tokens to edit at a place, none if there are none."""
        key = self.key(place)
        if key not in self._known:
            self._known[key] = self._find(place)
        return self._known[key]

    def tiles(self, place: Place, device: torch.device) -> list[Tile]:
        """The tokens to edit at a place, as tables on a device."""
        key = self.key(place)
        if key not in self._tiles:
            tokens = self.at(place)
            self._tiles[key] = [] if tokens is None else [tile.to(device) for tile in tokens.tiles()]
        return self._tiles[key]

    def _find(self, place: Place) -> Tokens | None:
        runs = []
        for row, start, low, count in self._active:
            number = row.pattern.get(place)
            for a, b in () if number is None else row.spans[number]:
                a, b = max(a, low), low + count if b is None else min(b, low + count)
                if a < b:
                    runs.append((row.slot, start + a - low, b - a, row.strength))
        if not runs:
            return None
        runs.sort()
        counts = np.array([run[2] for run in runs])
        first = np.repeat([run[1] for run in runs], counts)
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        strength = np.repeat(np.array([run[3] for run in runs], dtype=np.float32), counts)
        return Tokens(first + within, np.repeat([run[0] for run in runs], counts), strength)


def plan(rows: Mapping[int, Row], starts: Sequence[int], computed: Sequence[int]) -> Step | None:
    """Return what a step edits; none if no row has a located token in it, as while tokens are generated.

    Args:
        rows: the rows that have an adapter, by their number in the batch; others may be left out.
        starts: `[rows + 1]`, where each row's tokens begin among those of the step.
        computed: `[rows]`, how many tokens of each request are computed already.
    """
    active = []
    for number, row in rows.items():
        if number + 1 < len(starts):
            low, count = computed[number], starts[number + 1] - starts[number]
            if count and (row.end is None or low < row.end):
                active.append((row, starts[number], low, count))
    return Step(active) if active else None
