"""What the steps of an epoch compute and hold, counted from where rows are cut; nothing is run.

Where a row is cut, `tuner.resolve.locate` and `reach.rows.cut` say. What follows from it for a batch is what
`SkipPrefixes` and `SkipLayers` do: a prefix once, a window in each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch.nn.utils.rnn import pad_sequence

from ..positions import IGNORED
from ..reach.layers import SkipLayers
from ..reach.prefixes import SkipPrefixes
from ..reach.rows import cut
from ..tuner.registry import Edits
from ..tuner.resolve import locate

_CHUNK = 256  # rows that are cut together


@dataclass(frozen=True)
class CutRow:
    """A row without padding, whose window is `[start, end)`.

    Args:
        length, start, end: in tokens.
        edited: how many tokens are edited.
        prefix, whole: what tells the tokens before the window, and those up to its end, from others.
    """

    length: int
    start: int
    end: int
    edited: int
    prefix: bytes
    whole: bytes


@dataclass
class Count:
    """What was computed: tokens of rows and their padding, and of these the ones that got gradients.

    Args:
        tokens: of whole rows.
        computed: of windows.
        largest: of the windows of one batch.
        frozen: tokens times layers that were computed without gradients, to be held.
    """

    tokens: int = 0
    computed: int = 0
    largest: int = 0
    frozen: int = 0


@dataclass
class Held:
    """What a `reach.store.Store` would hold.

    Args:
        budget: how many bytes.
        spills: whether a directory takes what does not fit.
    """

    budget: int
    spills: bool = False
    bytes: int = 0
    full: bool = False
    known: set = field(default_factory=set)

    def put(self, key: Any, size: int) -> None:
        """Hold an entry, if it fits."""
        fits = self.bytes + size <= self.budget
        if fits or self.spills:
            self.known.add(key)
        else:
            self.full = True
        self.bytes += size if fits else 0


def cut_rows(edits: Edits, rows: Sequence[dict[str, Any]]) -> list[CutRow]:
    """Cut rows of `input_ids` and `labels` where the rules of the edits say."""
    found = []
    for begin in range(0, len(rows), _CHUNK):
        some = rows[begin : begin + _CHUNK]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in some], batch_first=True)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in some], batch_first=True, padding_value=IGNORED)
        lengths = [len(row["input_ids"]) for row in some]
        text = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        located = locate(edits, text, labels, ids, {})
        edited = (torch.stack(list(located.masks.values())).any(0) & text).sum(1).tolist()
        where = cut(text, located.masks.values(), labels)
        for row, length, start, end, count in zip(ids.numpy(), lengths, where.start, where.end, edited, strict=True):
            prefix, whole = (xxhash.xxh3_128_digest(row[:stop].tobytes()) for stop in (start, end))
            found.append(CutRow(length, start, end, count, prefix, whole))
    return found


def count_batches(
    way: SkipPrefixes | SkipLayers | None, batches: Sequence[Sequence[CutRow]], held: Held, width: int
) -> Count:
    """Count what a pass over batches computes, and put into `held` what it would hold.

    Args:
        way: see `Reach.find_way`.
        width: how many bytes a token's state takes between two layers.
    """
    count = Count()
    for batch in batches:
        tokens = len(batch) * max(row.length for row in batch)
        computed = tokens
        if isinstance(way, SkipPrefixes):
            computed = len(batch) * max(row.end - row.start for row in batch)
            count.frozen += _count_behind(way, batch, held, width)
        elif way is not None:
            count.frozen += _count_above(way, batch, held, width)
        count.tokens += tokens
        count.computed += computed
        count.largest = max(count.largest, computed)
    return count


def _count_behind(way: SkipPrefixes, batch: Sequence[CutRow], held: Held, width: int) -> int:
    """Tokens times layers of the prefixes, and below the edits of the windows, that are not held yet."""
    prefixes: dict[Any, int] = {}
    windows: dict[Any, tuple[int, Any]] = {}
    for row in batch:
        prefix = ("prefix", row.start, row.prefix)
        if row.start:
            prefixes[prefix] = row.start
        if way.kept:
            windows["states", row.start, row.whole] = row.end - row.start, prefix
    lacking = {key: found for key, found in windows.items() if key not in held.known}
    unknown = [key for key in prefixes if key not in held.known]
    again = {prefix for _, prefix in lacking.values()}  # run as far as the windows below the edits need them
    wanted = [length for key, length in prefixes.items() if key in unknown or key in again]
    frozen = 0
    if wanted:
        frozen += len(wanted) * max(wanted) * (len(way.parts.blocks) if unknown else way.kept)
    if lacking:
        frozen += len(lacking) * max(length for length, _ in lacking.values()) * way.kept
    for key in unknown:
        held.put(key, way.layout.size(prefixes[key]) if way.layout else 0)
    for key, (length, _) in lacking.items():
        held.put(key, length * width)
    return frozen


def _count_above(way: SkipLayers, batch: Sequence[CutRow], held: Held, width: int) -> int:
    """Tokens times layers below the edits that are not held yet."""
    longest = max(row.length for row in batch)
    lacking = {}
    for row in batch:
        key = (longest if way.padding else 0), row.length, row.whole
        if key not in held.known:
            lacking[key] = (longest if way.padding else row.length) * width
    for key, size in lacking.items():
        held.put(key, size)
    return len(lacking) * longest * way.kept
