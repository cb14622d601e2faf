"""Keys and values of prefixes: taken from a model's cache row by row, and put together for a batch of other rows.

They are the model's own, whatever their shape; nothing is known of tokens, edits or blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Pair = tuple[Tensor, Tensor]  # keys and values of one row at one block, `[heads, tokens, width]` each


def sliding_window(layer: CacheLayerMixin) -> int | None:
    """How many tokens a cached layer's attention sees, itself included; none for all of them."""
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def _visible(length: int, span: int | None) -> int:
    """How many of the last tokens of a prefix the tokens behind it see."""
    return length if span is None else min(length, span - 1)


def is_ordinary(cache: Any) -> bool:
    """Whether a cache holds nothing but keys and values of attention, all of them or those of a sliding window."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)


def empty_cache(sliding: Sequence[int | None]) -> Cache:
    """A cache to be filled, such as the model makes.

    Args:
        sliding: see `sliding_window`; one for each block of the model.
    """
    return Cache(layers=[DynamicLayer() if span is None else DynamicSlidingWindowLayer(span) for span in sliding])


def pairs_of(cache: Cache, row: int, length: int, blocks: int) -> list[Pair]:
    """What the first blocks of a cache hold of the last `length` tokens of a row; views."""
    found = []
    for layer in cache.layers[:blocks]:
        kept = _visible(length, sliding_window(layer))
        found.append(tuple(part[row, :, part.shape[-2] - kept :] for part in (layer.keys, layer.values)))
    return found


class Layout:
    """How the pairs of several blocks are held in a few tensors: those of one shape and device are stacked.

    Args:
        pairs: those of any row.
        sliding: of the same blocks, see `sliding_window`.
    """

    def __init__(self, pairs: Sequence[Pair], sliding: Sequence[int | None]) -> None:
        groups: dict[tuple, int] = {}
        self._sizes: list[int] = []
        self._places: list[tuple[int, int]] = []  # of the keys and the values of each block in turn
        for pair, span in zip(pairs, sliding, strict=True):
            for part in pair:
                kind = (span, part.shape[0], part.shape[2], part.dtype, part.device)
                group = groups.setdefault(kind, len(groups))
                if group == len(self._sizes):
                    self._sizes.append(0)
                self._places.append((group, self._sizes[group]))
                self._sizes[group] += 1
        self._kinds = list(groups)
        self.devices = [kind[-1] for kind in groups]

    def size(self, length: int) -> int:
        """How many bytes the pairs of a prefix of so many tokens take."""
        total = 0
        for count, (span, heads, width, dtype, _) in zip(self._sizes, self._kinds, strict=True):
            total += count * heads * _visible(length, span) * width * dtype.itemsize
        return total

    def pack(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Copy pairs into a few tensors."""
        groups: list[list[Tensor]] = [[] for _ in self._sizes]
        for (group, _), part in zip(self._places, (part for pair in pairs for part in pair), strict=True):
            groups[group].append(part)
        return [torch.stack(parts) for parts in groups]

    def unpack(self, packed: Sequence[Tensor]) -> list[Pair]:
        """The pairs of each block, views, on the devices of the blocks."""
        there = [part.to(device, non_blocking=True) for part, device in zip(packed, self.devices, strict=True)]
        parts = [there[group][index] for group, index in self._places]
        return list(zip(parts[::2], parts[1::2], strict=True))


class PrefixLayer(CacheLayerMixin):
    """One block's keys and values of the prefixes of a batch, joined with those of the windows as they come.

    Args:
        rows: a pair for each row, none for a row without a prefix; none at all for a block that is not run.
        past: how many columns the prefixes take, the shorter ones aligned to the right.
        span: see `sliding_window`.
    """

    def __init__(self, rows: list[Pair | None] | None, past: int, span: int | None) -> None:
        super().__init__()
        self.is_sliding = span is not None
        self.is_initialized = True
        self._rows, self._past, self._span = rows, past, span
        self._kept = _visible(past, span)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Return `[batch, heads, kept + width, …]`; nothing is kept, so a recomputation finds the same."""
        if self._rows is None:
            raise RuntimeError("The keys of a block that was to be left out are asked for.")
        rows = self._rows
        keys = [None if pair is None else pair[0] for pair in rows]
        values = [None if pair is None else pair[1] for pair in rows]
        return _Join.apply(key_states, keys, self._kept), _Join.apply(value_states, values, self._kept)

    def get_seq_length(self) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kept + query_length, self._past - self._kept

    def get_max_length(self) -> int:
        return -1 if self._span is None else self._span

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefixes are here."""


def prefix_cache(
    rows: Sequence[Sequence[Pair] | None], past: int, sliding: Sequence[int | None], blocks: range
) -> Cache:
    """Return the cache of a batch.

    Args:
        rows: for each row the pairs of some blocks, none for a row without a prefix.
        past: see `PrefixLayer`.
        sliding: see `sliding_window`; one for each block of the model.
        blocks: those of the pairs; no others are run.
    """
    layers = []
    for number, span in enumerate(sliding):
        pairs = [None if row is None else row[number - blocks.start] for row in rows] if number in blocks else None
        layers.append(PrefixLayer(pairs, past, span))
    return Cache(layers=layers)


class _Join(torch.autograd.Function):
    """Copies prefixes and windows into one tensor, once: `torch.cat` would need the padded prefixes first."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, rows: list[Tensor | None], kept: int) -> Tensor:
        ctx.width = new.shape[-2]
        joined = new.new_empty((*new.shape[:2], kept + ctx.width, new.shape[3]))
        for target, row in zip(joined, rows, strict=True):
            length = 0 if row is None else row.shape[-2]
            if length < kept:
                target[:, : kept - length] = 0  # masked, but garbage there could be infinite
            if row is not None:
                target[:, kept - length : kept] = row
        joined[:, :, kept:] = new
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[:, :, -ctx.width :], None, None
