"""The located tokens of a batch of sequences, as masks; and the windows of them that a forward computes.

Plain tensors: nothing is known of rules, models or layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ReftError

Key = tuple[str, int]  # an adapter and the number of one of its representations
Window = tuple[Tensor, Tensor] | None  # row and column of every token to edit; none for every token there is


class Located:
    """The located tokens of a batch of sequences.

    Args:
        rows: by adapter, the rows `[batch]` that it edits, if not all of them.
    """

    def __init__(self, rows: dict[str, Tensor] | None = None) -> None:
        self.masks: dict[Key, Tensor] = {}  # `[batch, tokens]`; equal rules share the tensor
        self.subspaces: dict[Key, Tensor] = {}  # `[batch, rank]`, the directions that each row's edits may take
        self.endless: set[Key] = set()  # those that cover every token after the mask, too
        self.length = 0
        self.by_row = bool(rows)  # then no two adapters edit the same token
        self._rows = rows or {}
        self._made: dict[tuple[int, str], Tensor] = {}

    def add(self, key: Key, mask: Tensor, endless: bool = False) -> None:
        """Add the located tokens of a representation."""
        if (rows := self._rows.get(key[0])) is not None:
            mask = self._made.setdefault((id(mask), key[0]), mask & rows[:, None])
        self.masks[key] = mask
        self.length = max(self.length, mask.shape[1])
        if endless:
            self.endless.add(key)

    def done(self, end: int) -> bool:
        """Whether nothing is located from this index on."""
        return end >= self.length and not self.endless

    def windows(self, past: int, tokens: int, rows: int) -> dict[Key, Window]:
        """What to edit in a forward over the tokens `[past, past + tokens)`.

        Rows that beams or several answers to a prompt have multiplied share the locations of their prompt.
        """
        found: dict[Key, Window] = {}
        seen: dict[tuple[int, bool], Window] = {}
        for key, mask in self.masks.items():
            endless, only = key in self.endless, self._rows.get(key[0])
            if endless and past >= self.length and only is None:
                found[key] = None
                continue
            same = id(mask), endless
            if same not in seen:
                part = mask[:, past : past + tokens]
                if endless:
                    part = nn.functional.pad(part, (0, tokens - part.shape[1]), value=True)
                    part = part if only is None else part & only[:, None]
                part = part.repeat_interleave(rows // len(part), dim=0)
                seen[same] = part.nonzero(as_tuple=True)  # type: ignore[assignment]
            at = seen[same]
            if at is not None and len(at[0]):
                found[key] = at
        return found


def mask_of(columns: Tensor, length: int) -> Tensor:
    """`[batch, positions]` indices as a mask `[batch, length]`; -1 is none."""
    mask = columns.new_zeros((len(columns), length + 1), dtype=torch.bool)
    return mask.scatter(1, columns.long() % (length + 1), True)[:, :length]


def row_masks(
    row_adapters: list[str] | None, names: list[str], tokens: Tensor, beams: bool = False
) -> dict[str, Tensor]:
    """By adapter, the rows `[batch]` that it edits, where each row has its own; with `beams`, a row may be several.

    Raises:
        ReftError: another number of names than rows.
    """
    if row_adapters is None:
        return {}
    times, rest = divmod(len(tokens), len(row_adapters) or 1)
    if rest or not times or (times > 1 and not beams):
        raise ReftError(
            f"adapter_names: expected one name for each of the {len(tokens)} rows, got {len(row_adapters)}."
        )
    return {
        name: torch.tensor([row == name for row in row_adapters], device=tokens.device).repeat_interleave(times)
        for name in names
    }


def subspace_masks(
    given: Any, ranks: dict[Key, int | None], counts: dict[str, int], tokens: Tensor
) -> dict[Key, Tensor]:
    """Turn `[batch][interventions][directions]` into a mask `[batch, rank]` for each representation.

    None in the place of a list of directions allows all of them.

    Raises:
        ReftError: another nesting, a direction outside the rank, or an intervention without a rank.
    """
    rows = given.tolist() if isinstance(given, Tensor) else given
    wanted = sorted(set(counts.values()))
    masks: dict[Key, Tensor] = {}
    try:
        if len(rows) != len(tokens) or any(len(row) != count for row in rows for count in wanted):
            raise TypeError
        for key, rank in ranks.items():
            if rank is None:
                raise ReftError("subspaces: only an intervention with a rank has directions to choose from.")
            mask = torch.zeros(len(rows), rank, dtype=torch.bool)
            for row, entry in enumerate(rows):
                chosen = range(rank) if entry[key[1]] is None else entry[key[1]]
                if not all(0 <= direction < rank for direction in chosen):
                    raise ReftError(f"subspaces: expected directions from 0 to {rank - 1}, got {list(chosen)}.")
                mask[row, list(chosen)] = True
            masks[key] = mask.to(tokens.device)
    except TypeError:
        raise ReftError(
            f"subspaces: expected [batch][interventions][directions] for a batch of {len(tokens)} and "
            f"{' or '.join(map(str, wanted))} interventions, got {given!r}."
        ) from None
    return masks
