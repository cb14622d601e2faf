"""Batches to try on a model: a few rows of a real one, cut, repeated and padded to sizes that it has to stand."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..positions import IGNORED
from ..tuner.call import LOCATIONS
from .arguments import COUNT
from .rows import Rows, bounds

_AROUND = 6  # tokens before and after the beginning of a window
_FAR = 64  # columns of padding before a short row
_ENDS = 4  # tokens with labels at the beginning and at the end of a long window


@dataclass(frozen=True)
class Sample:
    """What is taken of a batch.

    Args:
        ids: `[n]`, of the row with the longest prefix, around the beginning of its window.
        edited: `[n]`, which of these are edited.
        begin: where the window begins in them.
        count: how many places an adapter edits.
        longest: how many tokens the longest row has.
    """

    ids: Tensor
    edited: Tensor
    begin: int
    count: int
    longest: int

    @classmethod
    def of(cls, ids: Tensor, edited: Tensor, rows: Rows, count: int) -> "Sample":
        """Take it.

        Args:
            ids, edited: `[batch, tokens]`.
            rows: where they are cut.
            count: see above.
        """
        number = rows.prefix_lengths.index(rows.past)
        first = max(rows.first[number], rows.start[number] - _AROUND)
        last = max(rows.start[number] + _AROUND, first + 3)
        longest = max(end - begin for begin, end in zip(rows.first, rows.end, strict=True))
        begin = rows.start[number] - first
        return cls(ids[number, first:last], edited[number, first:last], begin, count, longest)


def far(sample: Sample, columns: int) -> dict[str, Any]:
    """A short row and its end, behind much padding, in no more than so many columns."""
    ids = sample.ids
    room = min(_FAR, max(0, columns - len(ids)))
    return _padded(ids, sample.edited, sample.count, (room, 0), _gap(ids))


def near(sample: Sample) -> dict[str, Any]:
    """A short row, and another before a little padding."""
    return _padded(sample.ids, sample.edited, sample.count, (0, 0), -_gap(sample.ids), shifted=True)


def long(sample: Sample, columns: int, context: int) -> list[dict[str, Any]]:
    """Two batches of so many columns: with a window of one token at the end of a long row, and behind a prefix of one.

    Beside the long row is a short one, whose padding fills the columns. Few tokens have labels.
    """
    length = min(columns, max(sample.longest, context))
    if length < 3:  # as short as the sample
        return []
    ids = sample.ids.repeat(-(-length // len(sample.ids)))[:length]
    short = min(2 * _AROUND, length)
    batches = []
    for begin, pad, gap in (
        (length - 2, (columns - length, 0), length - short),
        (1, (0, columns - length), short - length),
    ):
        edited = torch.zeros_like(ids, dtype=torch.bool)
        pattern = sample.edited[sample.begin :][: length - begin]
        edited[begin : begin + len(pattern)] = pattern
        edited[begin] = True
        batch = _padded(ids, edited, sample.count, pad, gap)
        batch["labels"] = _thinned(batch["labels"])
        batches.append(batch)
    return batches


def whole(call: dict[str, Any]) -> dict[str, Any]:
    """The longest row of a batch, its beginning behind a little padding, and its shortest row before some.

    They have as many columns as the batch, so no position is tried that it does not have.
    """
    ids = call["input_ids"]
    mask = call.get("attention_mask")
    text = torch.ones_like(ids) if mask is None else mask
    spans = [(int(first), int(last)) for first, last in zip(*bounds(text.bool()), strict=True)]
    sizes = [last - first for first, last in spans]
    most, least = sizes.index(max(sizes)), sizes.index(min(sizes))
    columns = ids.shape[1]
    room = max(columns - 2, 1)

    def moved(values: Tensor, row: int, fill: int, left: bool) -> Tensor:
        first, last = spans[row]
        part = values[row, first : min(last, first + room)]
        rest = columns - len(part)
        return nn.functional.pad(part, (rest, 0) if left else (0, rest), value=fill)

    few = {"attention_mask": text} | {name: value for name, value in call.items() if value is not None}
    few.pop(COUNT, None)
    for name, value in few.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            fill = IGNORED if name == "labels" else 0
            few[name] = torch.stack((value[most], moved(value, most, fill, True), moved(value, least, fill, False)))
        elif isinstance(value, Tensor) and value.dim() and len(value) == len(ids):
            few[name] = value[[most, most, least]]
        elif isinstance(value, list) and len(value) == len(ids):
            few[name] = [value[most], value[most], value[least]]
    return few


def _padded(
    ids: Tensor, edited: Tensor, count: int, pad: tuple[int, int], gap: int, shifted: bool = False
) -> dict[str, Any]:
    """A batch of a row and of a part of it, edited and with labels from there on.

    Args:
        ids, edited: of the row.
        count: see `Sample`.
        pad: columns of padding before and after both.
        gap: how many tokens the other lacks at its beginning; at its end if negative.
        shifted: let it begin where the row comes to as many tokens.
    """
    text = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    if gap > 0:
        text[1, :gap] = False
    elif gap < 0:
        text[1, gap:] = False
    other = [each.roll(gap) if shifted else each for each in (ids, edited)]
    batch, where, text = (
        nn.functional.pad(each, pad)
        for each in (torch.stack((ids, other[0])), torch.stack((edited, other[1])) & text, text)
    )
    columns = torch.arange(batch.shape[1], device=ids.device)
    locations = columns.where(where, -1)[:, None].expand(-1, count, -1)
    begin = columns.where(where, batch.shape[1] - 2).amin(1, keepdim=True)
    labels = batch.where(text & (columns > begin), IGNORED)
    return {"input_ids": batch, "attention_mask": text.long(), "labels": labels, LOCATIONS: locations}


def _thinned(labels: Tensor) -> Tensor:
    """The first and the last few labels of each row alone."""
    given = labels != IGNORED
    number = given.cumsum(1)
    return labels.where(given & ((number <= _ENDS) | (number > number[:, -1:] - _ENDS)), IGNORED)


def _gap(ids: Tensor) -> int:
    return max(0, min(2, len(ids) - 2))
