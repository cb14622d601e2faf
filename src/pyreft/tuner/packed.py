"""Packed rows: several examples one after the other in a row, as padding-free training has them.

Knows how a row is told to be packed, and lays its examples apart and together again. Rules and models are not known.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..positions import IGNORED


class Packed:
    """The examples of packed rows, as padded rows of their own.

    Args:
        starts: `[batch, tokens]`, true for the first token of each example.
    """

    def __init__(self, starts: Tensor) -> None:
        batch, tokens = starts.shape
        starts = starts.clone()
        starts[:, 0] = True
        self._row = starts.flatten().cumsum(0) - 1  # [batch * tokens]: the example of each token
        lengths = torch.bincount(self._row)
        ends = lengths.cumsum(0)
        self._column = torch.arange(batch * tokens, device=starts.device) - (ends - lengths)[self._row]
        self._apart = len(lengths), int(lengths.max())
        self._together = batch, tokens

    @property
    def examples(self) -> Tensor:
        """The number of each token's example, `[batch, tokens]`."""
        return self._row.view(self._together)

    def apart(self, values: Tensor, fill: float) -> Tensor:
        """Lay `[batch, tokens]` out as `[examples, longest]`, padded on the right."""
        rows = values.new_full(self._apart, fill)
        rows[self._row, self._column] = values.flatten()
        return rows

    def together(self, rows: Tensor) -> Tensor:
        """Put `[examples, at least longest]` back into `[batch, tokens]`."""
        return rows[self._row, self._column].view(self._together)

    def labels_apart(self, labels: Tensor) -> Tensor:
        """Lay labels apart, `[examples, longest]`.

        In a packed row the first token of an example never has a loss: the example before it would be asked for it.
        So a loss from the second token on means what one from the first token on means in a row of its own: a text
        without a prompt.
        """
        rows = self.apart(labels, IGNORED)
        return torch.cat((rows[:, 1:2], rows[:, 1:]), dim=1) if rows.shape[1] > 1 else rows


def find_packed(inputs: Tensor, kwargs: dict[str, Any]) -> Packed | None:
    """Return the examples of a call's rows; none if each row is one text.

    As transformers has it: without an attention mask, rows are packed if `position_ids` begin anew, or if
    `cu_seq_lens_q` say where the examples of the only row begin. A mask `[batch, 1, tokens, tokens]` parts them where a
    token does not see the one before it, and positions that begin anew do; but a token that sees earlier ones instead
    goes on from these, as one of several answers to a prompt does, or one behind padding, and padding begins nothing.

    Args:
        inputs: ids or embeddings, `[batch, tokens, ...]`.
        kwargs: of the call.
    """
    mask, positions, bounds = (kwargs.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if isinstance(mask, dict):  # one for each kind of layer; the widest tells the most
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    sees = _allowed(mask, inputs) if mask is not None else None
    if mask is not None and sees is None:
        return None
    starts = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    if sees is not None:
        sees = sees.to(inputs.device)
        apart = ~sees.diagonal(offset=-1, dim1=-2, dim2=-1)
        starts[:, 1:] = apart
    if sees is None and isinstance(bounds, Tensor) and len(inputs) == 1:
        starts[0, bounds[:-1].to(inputs.device).long()] = True
    elif isinstance(positions, Tensor) and positions.shape in (inputs.shape[:2], (1, inputs.shape[1])):
        starts |= nn.functional.pad(positions.diff(dim=-1) != 1, (1, 0)).to(inputs.device)
    elif sees is None:
        return None  # and a compiled forward need not ask
    if sees is not None:
        goes_on = apart & sees.tril(-1).any(-1)[:, 1:]
        starts[:, 1:] &= sees.any(1)[:, 1:] & ~goes_on
    return Packed(starts) if bool(starts[:, 1:].any()) else None


def tokens_of(mask: Any, inputs: Tensor, rows: int, end: int) -> Tensor:
    """Which of the columns up to `end` are tokens, not padding, `[rows, end]`.

    As transformers has it: a mask of two dimensions that is too short goes on with padding, and of one that is too long
    the beginning counts. By one of four dimensions a token is what any token sees, at the beginning of a sequence; a
    dict has one for each kind of layer.

    Args:
        mask: that of a call.
        inputs: of the forward, `[rows, tokens, ...]`.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows:
        mask = mask.bool()[:, :end]
        return mask if mask.shape[1] == end else nn.functional.pad(mask, (0, end - mask.shape[1]))
    sees = _allowed(mask, inputs) if mask is not None and end == inputs.shape[1] else None
    if sees is not None and len(sees) in (1, rows):
        return sees.any(1).expand(rows, end).to(inputs.device)
    return inputs.new_ones((rows, end), dtype=torch.bool)


def tell_of_cache(kwargs: dict[str, Any], config: Any) -> None:
    """Warn where transformers lets the examples of a row see each other although their positions begin anew."""
    apart = any(kwargs.get(name) is not None for name in ("attention_mask", "cu_seq_lens_q"))
    cached = kwargs.get("use_cache")
    if not apart and (getattr(config, "use_cache", False) if cached is None else cached):
        warnings.warn(
            "position_ids begin anew within a row, so each of its examples is edited by itself; but with a cache "
            "transformers lets each of them see those before it. Pass use_cache=False, or a mask that parts them.",
            stacklevel=2,
        )


def _allowed(mask: Any, inputs: Tensor) -> Tensor | None:
    """Which tokens each one sees, `[batch or 1, tokens, tokens]`, by a mask of four dimensions; none by another."""
    tokens = inputs.shape[1]
    if (by_index := getattr(mask, "mask_mod", None)) is not None and mask.shape[-2:] == (tokens, tokens):
        from torch.nn.attention.flex_attention import create_mask  # that of a `BlockMask`, for flex attention

        mask = create_mask(by_index, mask.shape[0], 1, tokens, tokens, device=str(inputs.device))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != (tokens, tokens):
        return None
    return mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0].bool()
