"""Whether a way to compute a step in part is exact for a model: a few tokens tell, beside the ordinary step."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.call import LOCATIONS
from ..tuner.edits import Edits
from ..tuner.layer import ReftLayer
from .parts import Parts
from .store import Store
from .ways import FUSED, TYPES, Above, Behind
from .window import IGNORED, NotExactError, Rows

_ATTENTIONS = {"full_attention", "sliding_attention"}  # which see a token's own past, wherever its row begins
_PROBED = 6  # tokens before and after the beginning of a window
_SHIFT = 64  # columns of padding before them
_UNLIKE = (  # what models may raise that cannot be run in parts
    NotExactError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Probe:
    """Tries ways beside the ordinary step, without randomness.

    A base model in float32 is tried in float32, even if it is trained in mixed precision.

    Args:
        parts: of the base model.
        edits: of its edits.
        limit: the longest row whose angles do not depend on its length.
    """

    def __init__(self, parts: Parts, edits: Edits, limit: int | None) -> None:
        self._parts, self._edits, self._limit, self._base = parts, edits, limit, parts.base
        self.why_not = f"parts of {type(parts.base).__name__} computed apart differ from the whole"

    def find(
        self, call: dict[str, Any], ordinary: Callable[..., Any], kept: int, causal: bool, key: bytes
    ) -> Behind | Above | None:
        """Return the way that is exact; none where none is.

        Args:
            call: a batch; a few of its tokens are tried.
            ordinary: the ordinary step.
            kept, key: see `Behind`.
            causal: whether all of the base model is frozen.

        Raises:
            NotExactError: a batch that tells nothing of the model.
        """
        parts, kind = self._parts, call["input_ids"].device.type
        config = self._base.config.get_text_config()
        causal = causal and self._edits.causal and parts.backbone is not self._base and call.get(TYPES) is None
        causal = causal and set(getattr(config, "layer_types", None) or ()) <= _ATTENTIONS
        mixed = torch.is_autocast_enabled(kind) and self._base.dtype != torch.float32
        devices = [call["input_ids"].device] if kind == "cuda" else []
        with (
            torch.no_grad(),
            _without_dropout(self._edits.layers),
            torch.autocast(kind, enabled=mixed),
            torch.random.fork_rng(devices),  # the training draws as if nothing had been tried
        ):
            if causal and (way := self._behind(call, ordinary, kept, key)) is not None:
                return way
            for padding in (False, True) if kept else ():
                above = Above(parts, self._edits, kept, padding, key)
                if self._is_exact_above(above, call, ordinary):
                    return above
        return None

    def _behind(self, call: dict[str, Any], ordinary: Callable[..., Any], kept: int, key: bytes) -> Behind | None:
        """The way that counts positions as the model does, if it is exact.

        Where a row's padding changes them only in a rounding, as with rotary positions, they are counted without it:
        then what is held serves the row in any batch.
        """
        ways = [Behind(self._parts, self._edits, kept, offsets, key) for offsets in (False, True)]
        far, near = self._few(call, *ways[0].cut_at(call))
        try:
            expected = [ordinary(**each) for each in (far, near)]
            plain, offset = (
                max(_distance_behind(way, *pair) for pair in zip((far, near), expected, strict=True)) for way in ways
            )
            way = ways[plain > max(4 * offset, 2 * torch.finfo(self._base.dtype).eps, 1e-4)]
            if call.get(FUSED):
                near, expected[1] = near | {FUSED: True}, ordinary(**near, **{FUSED: True})
            output = way(near, ordinary, Store(0))  # a model may have a loss of its own
            distance = max(min(plain, offset), _distance(output, expected[1], ("loss",)))
        except _UNLIKE as error:
            self.why_not = str(error)  # a model that cannot be run in parts at all
            return None
        way.tokens = way.computed = 0
        return way if distance <= self._tolerance() else None

    def _few(self, call: dict[str, Any], edited: Tensor, rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
        """A few tokens on either side of the beginning of a window, behind much padding, and before a little."""
        number = rows.prefix_lengths.index(rows.past)
        first = max(rows.first[number], rows.start[number] - _PROBED)
        last = max(rows.start[number] + _PROBED, first + 3)
        ids, where = call["input_ids"][number, first:last], edited[number, first:last]
        count = max(len(self._edits.rules[name]) for name in self._edits.active)
        width = self._limit or getattr(self._base.config.get_text_config(), "max_position_embeddings", None)
        room = min(_SHIFT, max(0, (width or _SHIFT + len(ids)) - len(ids)))
        return _padded_left(ids, where, count, room), _padded_right(ids, where, count)

    def _is_exact_above(self, way: Above, call: dict[str, Any], ordinary: Callable[..., Any]) -> bool:
        """Compare what the model returns for a few rows, padded on either side."""
        few = _two_padded(call)
        store = Store(1 << 62)
        expected = ordinary(**few)
        found = [way(few, ordinary, store) for _ in range(2)]  # computed, then held
        return all(_distance(one, expected, ("logits",)) <= self._tolerance() for one in found)

    def _tolerance(self) -> float:
        """What rounding may make of a tensor, relative to it; structural differences are far larger."""
        return max(8 * torch.finfo(self._base.dtype).eps, 1e-4)


def _padded_left(ids: Tensor, where: Tensor, count: int, room: int) -> dict[str, Any]:
    """A batch of a row and its end, behind padding, edited at these tokens."""
    text = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    text[1, : _gap(ids)] = False
    pad = (room, 0)
    batch, edited = (nn.functional.pad(each.repeat(2, 1), pad) for each in (ids, where))
    return _labelled(batch, edited, nn.functional.pad(text, pad), count)


def _padded_right(ids: Tensor, where: Tensor, count: int) -> dict[str, Any]:
    """A batch of a row and its end, before padding."""
    text = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    text[1, len(ids) - _gap(ids) :] = False
    batch, edited = (torch.stack((each, each.roll(-_gap(ids)))) for each in (ids, where))
    return _labelled(batch, edited, text, count)


def _gap(ids: Tensor) -> int:
    return min(2, len(ids) - 2)


def _labelled(ids: Tensor, edited: Tensor, text: Tensor, count: int) -> dict[str, Any]:
    edited = edited & text
    columns = torch.arange(ids.shape[1], device=ids.device)
    locations = columns.where(edited, -1)[:, None].expand(-1, count, -1)
    begin = columns.where(edited, ids.shape[1] - 2).amin(1, keepdim=True)
    labels = ids.where(text & (columns > begin), IGNORED)
    return {"input_ids": ids, "attention_mask": text.long(), "labels": labels, LOCATIONS: locations}


def _two_padded(call: dict[str, Any]) -> dict[str, Any]:
    """The first and the last row of a batch, one padded on the left, the other on the right."""
    ids = call["input_ids"]
    few = {"attention_mask": torch.ones_like(ids), **call}
    few.pop("num_items_in_batch", None)
    for name, value in few.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            fill = IGNORED if name == "labels" else 0
            few[name] = torch.stack(
                [nn.functional.pad(value[n], at, value=fill) for n, at in ((0, (2, 0)), (-1, (0, 2)))]
            )
        elif isinstance(value, Tensor) and value.dim() and len(value) == len(ids):
            few[name] = value[[0, -1]]
        elif isinstance(value, list) and len(value) == len(ids):
            few[name] = [value[0], value[-1]]
    return {name: value for name, value in few.items() if value is not None}


def _distance_behind(way: Behind, call: dict[str, Any], expected: Any) -> float:
    """How far the logits of tokens with labels are, when their states are computed and when they are held."""
    store = Store(1 << 62)
    found = []
    for _ in range(2):
        hidden, _, at = way.final(call, store)
        # what all logits of a token have in common would hide how they differ
        logits = [each - each.mean(-1, keepdim=True) for each in (way.parts.logits(hidden), expected.logits[at])]
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


@contextmanager
def _without_dropout(layers: list[ReftLayer]) -> Iterator[None]:
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.train()
