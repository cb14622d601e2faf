"""Which part of each row a step has to compute: plain tensors, nothing is known of models or of edits.

A row is cut in three: the prefix, which nothing learned can change; the window, from the first token that is edited
or whose logits are needed to the last one; and what comes after it, which the loss does not see. Prefixes are aligned
to the right and windows to the left, so that in every row the window's tokens follow the prefix's column by column.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..positions import IGNORED


class NotExactError(Exception):
    """Why a step cannot be computed in part; never seen outside, where it is computed as a whole instead."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch are cut, in columns: text is in `[first, …)`, the window in `[start, end)`.

    Args:
        first, start, end: one number for each row.
        device: where the batch is.
    """

    first: list[int]
    start: list[int]
    end: list[int]
    device: torch.device

    @cached_property
    def prefix_lengths(self) -> list[int]:
        """How many tokens of each row come before its window."""
        return [start - first for first, start in zip(self.first, self.start, strict=True)]

    @cached_property
    def past(self) -> int:
        """The longest prefix."""
        return max(self.prefix_lengths)

    @cached_property
    def width(self) -> int:
        """The longest window."""
        return max(end - start for start, end in zip(self.start, self.end, strict=True))

    @cached_property
    def columns(self) -> Tensor:
        """`[batch, width]`: the column of the batch that each column of the window is; see `valid`."""
        start, end = self._column(self.start), self._column(self.end)
        return torch.minimum(start + torch.arange(self.width, device=self.device), (end - 1).clamp(min=0))

    @cached_property
    def valid(self) -> Tensor:
        """`[batch, width]`, true for the tokens of a window, false for what fills the shorter ones."""
        lengths = self._column(self.end) - self._column(self.start)
        return torch.arange(self.width, device=self.device) < lengths

    @cached_property
    def attention_mask(self) -> Tensor:
        """`[batch, past + width]`, true for the tokens of prefixes and windows."""
        prefix = torch.arange(self.past, device=self.device) >= self.past - self._column(self.prefix_lengths)
        return torch.cat((prefix, self.valid), dim=1)

    def take(self, values: Tensor) -> Tensor:
        """The window's part, `[batch, width]`, of what is given for every token, `[batch, tokens]`."""
        return values.gather(1, self.columns)

    def select(self, rows: list[int]) -> "Rows":
        """Some of the rows."""
        first, start, end = ([values[row] for row in rows] for values in (self.first, self.start, self.end))
        return Rows(first, start, end, self.device)

    def within(self, columns: int) -> "Rows":
        """The same rows with shorter prefixes, where prefixes and windows take more columns than these together.

        No window grows by it beyond the longest, if each row fits into the columns: what filled the shorter windows up
        is text then.
        """
        most = max(columns - self.width, 0)
        if self.past <= most:
            return self
        start = [min(start, first + most) for start, first in zip(self.start, self.first, strict=True)]
        return Rows(self.first, start, self.end, self.device)

    def prefixes(self) -> "Rows":
        """The prefixes as windows of their own, behind nothing and aligned to the right."""
        return Rightmost(self.first, self.first, self.start, self.device)

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]


class Rightmost(Rows):
    """Windows without prefixes, aligned to the right."""

    @cached_property
    def columns(self) -> Tensor:
        return (self._column(self.end) - self.width + torch.arange(self.width, device=self.device)).clamp(min=0)

    @cached_property
    def valid(self) -> Tensor:
        return super().valid.flip(1)


def cut(tokens: Tensor, located: Iterable[Tensor], labels: Tensor) -> Rows:
    """Cut the rows of a batch.

    Args:
        tokens: `[batch, tokens]`, true for text, false for padding.
        located: masks of the same shape, true for tokens that are edited.
        labels: `[batch, tokens]`; the label of a token is predicted at the token before it.

    Raises:
        NotExactError: padding inside of a row, or labels at tokens that follow padding.
    """
    needed = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    reached = needed.clone()
    for mask in {id(mask): mask for mask in located}.values():
        reached |= mask
    first, last = bounds(tokens)
    start, end = bounds(reached & tokens)
    gaps = (last - first) != tokens.sum(1)
    astray = (needed & ~tokens).any(1)
    table = torch.stack((first, start, end, gaps, astray)).tolist()  # one transfer from the device
    if any(table[3]):
        raise NotExactError("padding lies inside of a row")
    if any(table[4]):
        raise NotExactError("a label follows padding")
    # a row without anything to compute keeps its first token, so that no row is empty
    rows = Rows(table[0], table[1], table[2], tokens.device)
    for row, (begin, stop) in enumerate(zip(rows.start, rows.end, strict=True)):
        if begin >= stop:
            rows.first[row] = rows.start[row] = min(rows.first[row], tokens.shape[1] - 1)
            rows.end[row] = rows.start[row] + 1
    return rows


def bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first column of each row of a mask and the one after the last; of an empty row all columns and none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return columns.where(mask, mask.shape[1]).amin(1), (columns + 1).where(mask, 0).amax(1)
