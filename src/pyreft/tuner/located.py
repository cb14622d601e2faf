"""The located tokens of a batch of sequences, as masks; and the windows of them that a forward computes.

Plain tensors: nothing is known of rules, models or layers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ReftError

Key = tuple[str, int]  # an adapter and the number of one of its representations


class Grid(NamedTuple):
    """The tokens to edit in rows that have an adapter each."""

    rows: Tensor  # `[rows, 1]`
    columns: Tensor  # `[rows, n]`, filled up with others where a row has fewer to edit
    valid: Tensor | None  # `[rows, n, 1]`, false for what fills up; none if nothing does


# row and column of every token to edit, or a grid of them; none for every token there is; in a compiled forward, whose
# shapes must not depend on which tokens they are, a mask `[batch, tokens]`
Window = tuple[Tensor, Tensor] | Grid | Tensor | None


class Located:
    """The located tokens of a batch of sequences.

    Args:
        groups: where each row has its own adapter, see `group_rows`; no two groups edit the same token.
    """

    def __init__(self, groups: dict[str, list[str | None]] | None = None) -> None:
        self.masks: dict[Key, Tensor] = {}  # `[batch, tokens]`; equal rules share the tensor
        self.subspaces: dict[Key, Tensor] = {}  # `[batch, rank]`, the directions that each row's edits may take
        self.endless: set[Key] = set()  # those that cover every token after the mask, too
        self.length = 0
        self.groups = groups or {}
        self._rows = {  # `[batch]`, of the groups that have not all of them
            name: torch.tensor([row is not None for row in rows]) for name, rows in self.groups.items() if None in rows
        }
        self._made: dict[tuple[int, str], Tensor] = {}

    def add(self, key: Key, mask: Tensor, endless: bool = False) -> None:
        """Add the located tokens of a representation."""
        if (rows := self._rows.get(key[0])) is not None:
            mask = self._made.setdefault((id(mask), key[0]), mask & rows.to(mask.device)[:, None])
        self.masks[key] = mask
        self.length = max(self.length, mask.shape[1])
        if endless:
            self.endless.add(key)

    def adapters(self, group: str, rows: int) -> list[str]:
        """The adapter of each row of a group of several adapters, in a forward of so many rows; empty if it is one."""
        own = self.groups.get(group, [])
        if len({*own} - {None}) < 2:
            return []
        return [name for name in own if name is not None for _ in range(rows // len(own))]

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
                    part = part if only is None else part & only.to(part.device)[:, None]
                times = rows // len(part)
                part = part.repeat_interleave(times, dim=0)
                if self.adapters(key[0], rows):
                    seen[same] = _grid(part, only if only is None else only.repeat_interleave(times))
                else:
                    seen[same] = part if torch.compiler.is_compiling() else part.nonzero(as_tuple=True)  # type: ignore
            at = seen[same]
            if at is not None and (at.shape[1] if isinstance(at, Tensor) else at[1].numel()):
                found[key] = at
        return found


def mask_of(columns: Tensor, length: int) -> Tensor:
    """`[batch, positions]` indices as a mask `[batch, length]`; -1 is none."""
    mask = columns.new_zeros((len(columns), length + 1), dtype=torch.bool)
    return mask.scatter(1, columns.long() % (length + 1), True)[:, :length]


def _grid(mask: Tensor, only: Tensor | None) -> Grid:
    """The located tokens of a mask `[rows, tokens]`; of these rows alone, if any of the rows have no part in it."""
    rows = torch.arange(len(mask)) if only is None else only.nonzero().squeeze(-1)
    rows = rows.to(mask.device)
    mask = mask[rows]
    counts = mask.sum(-1)
    fewest, most = int(counts.min()), int(counts.max())
    columns = mask.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
    return Grid(rows[:, None], columns, None if fewest == most else mask.gather(1, columns).unsqueeze(-1))


def group_rows(
    row_adapters: list[str] | None, kinds: dict[str, Any], tokens: Tensor, beams: bool = False
) -> dict[str, list[str | None]]:
    """Gather the adapters of one kind, whose rows are edited together, under the name of the first of them.

    Args:
        row_adapters: a name for each row.
        kinds: of the adapters that edit; they are equal for those that can be computed together, and none for others.
        tokens: `[batch, tokens]`.
        beams: a row may have become several.

    Returns:
        By group, the adapter of each row, `[batch]`, none in the rows that are not its own.

    Raises:
        ReftError: another number of names than rows.
    """
    if row_adapters is None:
        return {}
    times, rest = divmod(len(tokens), len(row_adapters) or 1)
    if rest or not times or (times > 1 and not beams):
        raise ReftError(
            f"expected one name for each of the {len(tokens)} rows, got {len(row_adapters)}.", setting="adapter_names"
        )
    groups: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        first = next((one for one in groups if kind is not None and kinds[one] == kind), name)
        groups.setdefault(first, set()).add(name)
    return {
        first: [row if row in names else None for row in row_adapters for _ in range(times)]
        for first, names in groups.items()
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
                raise ReftError("only an intervention with a rank has directions to choose from.", setting="subspaces")
            mask = torch.zeros(len(rows), rank, dtype=torch.bool)
            for row, entry in enumerate(rows):
                chosen = range(rank) if entry[key[1]] is None else entry[key[1]]
                if not all(0 <= direction < rank for direction in chosen):
                    raise ReftError(
                        f"expected directions from 0 to {rank - 1}, got {list(chosen)}.", setting="subspaces"
                    )
                mask[row, list(chosen)] = True
            masks[key] = mask.to(tokens.device)
    except TypeError:
        raise ReftError(
            f"expected [batch][interventions][directions] for a batch of {len(tokens)} and "
            f"{' or '.join(map(str, wanted))} interventions, got {given!r}.",
            setting="subspaces",
        ) from None
    return masks
