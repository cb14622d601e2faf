"""The located tokens of a batch of sequences, as masks; and those of them that lie in what a forward computes.

Plain tensors: nothing is known of rules, models or layers.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ReftError

Key = tuple[str, int]  # an adapter and the number of one of its representations


class Tokens(NamedTuple):
    """The tokens to edit in the states `[batch, tokens, d]` of a forward, as `[n, k, d]`.

    Where all rows share an adapter, each of n tokens stands alone, k = 1. Where each row has its own, k tokens of each
    of n rows stand together, filled up with others where a row has fewer. In a compiled forward, whose shapes must not
    depend on which tokens they are, all of them are here, and `valid` tells.
    """

    rows: Tensor | None = None  # `[n]`; none if all tokens of all rows are here, n = batch and k = tokens
    places: Tensor | None = None  # `[n * k]`, each a row times the number of tokens, plus a column; no place is twice
    valid: Tensor | None = None  # `[n, k]`, false for those that stay as they are; none if there are none

    def to(self, device: torch.device) -> "Tokens":
        """The same, where a layer is."""
        if all(part is None or part.device == device for part in self):
            return self
        return Tokens(*(part if part is None else part.to(device) for part in self))

    def of(self, states: Tensor) -> Tensor:
        """Gather them, `[n, k, d]`."""
        if self.rows is None or self.places is None:
            return states
        # by one index: torch gathers by several, and adds up what comes back, far more slowly
        gathered = states.flatten(0, 1).index_select(0, self.places)
        return gathered.view(self.rows.shape[0], -1, *states.shape[2:])  # heads may stand apart

    def alone(self) -> "Tokens":
        """Without those that stay as they are, which a compiled forward has among them, and k = 1."""
        if self.valid is None or self.places is not None:
            return self
        places = self.valid.flatten().nonzero().squeeze(-1)
        return Tokens(places // self.valid.shape[1], places)

    def put(self, states: Tensor, new: Tensor) -> Tensor:
        """The states with others in the place of these, `[n, k, d]`."""
        if self.places is None:
            return new
        return states.flatten(0, 1).index_copy(0, self.places, new.flatten(0, 1)).view_as(states)


EVERY = Tokens()


class Located:
    """The located tokens of a batch of sequences.

    Args:
        groups: where each row has its own adapter, see `group_rows`; no two groups edit the same token.
    """

    def __init__(self, groups: dict[str, list[str | None]] | None = None) -> None:
        self.masks: dict[Key, Tensor] = {}  # `[batch, tokens]`; equal rules share the tensor
        # `[batch, rank]`, the directions that each row's edits may take; as given, for those asked as in pyvene
        self.subspaces: dict[Key, Any] = {}
        self.examples: Tensor | None = None  # `[batch, tokens]`, the number of each token's, where rows have several
        self.endless: set[Key] = set()  # those that cover every token after the mask, too
        self.length = 0
        self.until: float = 0  # the index from which on nothing is located
        self.groups = groups or {}
        self._rows = {  # `[batch]`, of the groups that have not all of them
            name: torch.tensor([row is not None for row in rows]) for name, rows in self.groups.items() if None in rows
        }
        self._made: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # by its id, a mask, which stays alive; its part

    def add(self, key: Key, mask: Tensor, endless: bool = False) -> None:
        """Add the located tokens of a representation."""
        if (rows := self._rows.get(key[0])) is not None:
            _, mask = self._made.setdefault((id(mask), key[0]), (mask, mask & rows.to(mask.device)[:, None]))
        self.masks[key] = mask
        self.length = max(self.length, mask.shape[1])
        if endless:
            self.endless.add(key)
        self.until = math.inf if self.endless else self.length

    def agrees(self, other: "Located", past: int) -> bool:
        """Whether both have the same tokens before `past`; rows of either may stand for several of the other."""
        for key in self.masks.keys() | other.masks.keys():
            parts = [one.masks[key][:, :past] for one in (self, other) if key in one.masks]
            if len(parts) < 2:
                if bool(parts[0].any()):
                    return False
                continue
            rows, wide = max(map(len, parts)), max(part.shape[1] for part in parts)
            if any(rows % len(part) for part in parts):
                return False
            endless = key in self.endless or key in other.endless
            a, b = (
                nn.functional.pad(part, (0, wide - part.shape[1]), value=endless).repeat_interleave(
                    rows // len(part), 0
                )
                for part in parts
            )
            if not torch.equal(a, b.to(a.device)):
                return False
        return True

    def reorder(self, order: Tensor) -> None:
        """Move the tokens of each row, `order` `[batch, tokens]`: the new token j is what token `order[:, j]` was."""
        moved = {id(mask): take(mask, order) for mask in self.masks.values()}
        self.masks = {key: moved[id(mask)] for key, mask in self.masks.items()}

    def adapters(self, group: str, rows: int) -> list[str]:
        """The adapter of each row of a group of several adapters, in a forward of so many rows; empty if it is one."""
        own = self.groups.get(group, [])
        if len({*own} - {None}) < 2:
            return []
        if torch.compiler.is_compiling():  # where rows without any are computed, too
            own = [name or group for name in own]
        return [name for name in own if name is not None for _ in range(rows // len(own))]

    def within(self, past: int, tokens: int, rows: int) -> dict[Key, Tokens]:
        """What to edit in a forward over the tokens `[past, past + tokens)`; keys with nothing to edit are left out.

        Rows that beams or several answers to a prompt have multiplied share the locations of their prompt.
        """
        found: dict[Key, Tokens] = {}
        if not rows:
            return found
        seen: dict[tuple[int, bool], Tokens | None] = {}
        for key, mask in self.masks.items():
            endless, only = key in self.endless, self._rows.get(key[0])
            if endless and past >= self.length and only is None:
                found[key] = EVERY
                continue
            same = id(mask), endless
            if same not in seen:
                part = mask[:, past : past + tokens]
                if endless or 0 < part.shape[1] < tokens:  # also where no cache spares what comes after the prompt
                    part = nn.functional.pad(part, (0, tokens - part.shape[1]), value=endless)
                if endless and only is not None:
                    part = part & only.to(part.device)[:, None]
                times = rows // part.shape[0]  # which a trace follows, unlike its len
                part = part.repeat_interleave(times, dim=0)
                together = bool(self.adapters(key[0], rows))
                chosen = only if only is None or times == 1 else only.repeat_interleave(times)
                seen[same] = _tokens(part, together, chosen)
            if (at := seen[same]) is not None:
                found[key] = at
        return found


def take(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of `[batch, tokens, ...]`."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], order]


def mask_of(columns: Tensor, length: int) -> Tensor:
    """`[batch, positions]` indices as a mask `[batch, length]`; -1 is none."""
    mask = columns.new_zeros((len(columns), length + 1), dtype=torch.bool)
    return mask.scatter(1, columns.long() % (length + 1), True)[:, :length]


def _tokens(mask: Tensor, together: bool, only: Tensor | None) -> Tokens | None:
    """The true places of a mask `[rows, tokens]`, none if there are none.

    Args:
        together: those of a row stand together.
        only: `[rows]`, false for rows without any part in it.
    """
    if torch.compiler.is_compiling():
        return Tokens(valid=mask) if mask.shape[1] else None
    if not together:
        places = mask.flatten().nonzero().squeeze(-1)
        return Tokens(places // mask.shape[1], places) if len(places) else None
    rows = torch.arange(len(mask)) if only is None else only.nonzero().squeeze(-1)
    rows, tokens = rows.to(mask.device), mask.shape[1]
    mask = mask[rows]
    counts = mask.sum(-1)
    fewest, most = int(counts.min()), int(counts.max())
    columns = mask.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
    valid = None if fewest == most else mask.gather(1, columns)
    return Tokens(rows, (rows[:, None] * tokens + columns).flatten(), valid) if most else None


def times_of(row_adapters: list[str], rows: int, beams: bool = False) -> int:
    """How many rows there are for each name.

    Args:
        row_adapters: a name for each row of a batch.
        rows: those that there are.
        beams: a row may have become several.

    Raises:
        ReftError: another number of names than rows.
    """
    times, rest = divmod(rows, len(row_adapters) or 1)
    if rest or not times or (times > 1 and not beams):
        raise ReftError(
            f"expected one name for each of the {rows} rows, got {len(row_adapters)}.", setting="adapter_names"
        )
    return times


def group_rows(
    row_adapters: list[str], kinds: dict[str, Any], tokens: Tensor, beams: bool = False
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
    times = times_of(row_adapters, len(tokens), beams)
    groups: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        first = next((one for one in groups if kind is not None and kinds[one] == kind), name)
        groups.setdefault(first, set()).add(name)
    return {
        first: [row if row in names else None for row in row_adapters for _ in range(times)]
        for first, names in groups.items()
    }


def subspace_masks(
    given: Any, ranks: dict[Key, int | None], counts: dict[str, int], tokens: Tensor, untouched: Collection[Key] = ()
) -> dict[Key, Any]:
    """Turn `[batch][interventions][directions]` into a mask `[batch, rank]` for each representation.

    None in the place of a list of directions allows all of them, and so does a dict, which says nothing to ours.

    Args:
        untouched: those that get `[batch][directions]`, or the dict, as it stands.

    Raises:
        ReftError: another nesting, a direction outside the rank, or an intervention without a rank.
    """
    rows = given.tolist() if isinstance(given, Tensor) else given
    wanted = sorted(set(counts.values()))
    masks: dict[Key, Any] = {}
    try:
        if len(rows) != len(tokens) or any(len(row) != count for row in rows for count in wanted):
            raise TypeError
        for key, rank in ranks.items():
            entries = [row[key[1]] for row in rows]
            if all(entry is None for entry in entries):
                continue
            if key in untouched:
                masks[key] = entries[0] if isinstance(entries[0], dict) else entries
                continue
            if all(entry is None or isinstance(entry, dict) for entry in entries):
                continue
            if rank is None:
                raise ReftError("only an intervention with a rank has directions to choose from.", setting="subspaces")
            mask = torch.zeros(len(rows), rank, dtype=torch.bool)
            for row, entry in enumerate(entries):
                chosen = range(rank) if entry is None else entry
                if not all(0 <= direction < rank and not isinstance(direction, bool) for direction in chosen):
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
