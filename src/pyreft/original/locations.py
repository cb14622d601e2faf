"""The original's ways to say which tokens: `get_intervention_locations` and nested `unit_locations`."""

from typing import Any, Literal

from ..data.supervised import plain
from ..errors import ReftError
from ..positions import Positions

_SHAPE = '{"sources->base": (None, [interventions][batch][positions])}'


def parse_positions(positions: str) -> tuple[int, int]:
    """Return how many first and last tokens a rule `f<n>`, `l<n>` or `f<n>+l<m>` names.

    >>> parse_positions("f5+l3")
    (5, 3)
    """
    rule = Positions.parse(positions)
    if rule.whole:
        raise ReftError(
            f"expected f<n>, l<n> or f<n>+l<m>, got {positions!r}, which names no numbers.", setting="positions"
        )
    return rule.first, rule.last


def get_intervention_locations(
    *,
    last_position: int,
    num_interventions: int,
    positions: str | None = None,
    first_n: int | None = None,
    last_n: int | None = None,
    share_weights: bool = False,
    pad_mode: Literal["first", "last"] = "first",
    **further: Any,
) -> list[list[int]]:
    """Return the locations of one example, `[interventions][positions]`, as the original library does.

    Unlike a rule of `ReftConfig`, each side takes at most half of the prompt here, even where it stands alone.

    Args:
        last_position: the length of the prompt.
        num_interventions: how many interventions; without shared weights, the first half of them gets the prefix
            and the second half the suffix.
        positions: the rule, or else `first_n` and `last_n`.
        share_weights: one intervention edits prefix and suffix.
        pad_mode: where a prompt is too short, its missing locations become -1 (`"first"`, for datasets that put a
            padding token before the prompt) or `last_position` (`"last"`).
        further: of no use; data sets of one's own hand on all that they were given, `position` for one.

    Raises:
        ReftError: no positions, or an odd number of interventions for a prefix and a suffix apart.
    """
    if positions is not None:
        first_n, last_n = parse_positions(positions)
    if first_n is None or last_n is None:
        raise ReftError("expected positions='f<n>+l<m>', or first_n and last_n.", setting="positions")
    first, last = min(last_position // 2, first_n), min(last_position // 2, last_n)
    pad = -1 if pad_mode == "first" else last_position
    prefix, suffix = list(range(first)), list(range(last_position - last, last_position))
    if share_weights or not first or not last:
        both = prefix + suffix
        return [both + [pad] * (first_n + last_n - len(both)) for _ in range(num_interventions)]
    if num_interventions % 2:
        raise ReftError(
            f"a prefix and a suffix with weights of their own need an even number, got {num_interventions}.",
            setting="num_interventions",
        )
    width = max(first_n, last_n)
    half = num_interventions // 2
    sides = [prefix] * half + [suffix] * half
    return [side + [pad] * (width - len(side)) for side in sides]


def _nested(given: Any, batch: int, interventions: int) -> Any:
    """What the original's callers wrap in `{"sources->base": (None, L)}` or `{"base": L}`: L as plain lists.

    Also one number, or a bare list of them, for each intervention and row.
    """
    if isinstance(given, dict):
        given = next((given[key] for key in ("sources->base", "base") if key in given), None)
    paired = isinstance(given, tuple) or (isinstance(given, list) and len(given) == 2 and given[0] is None)
    nested = plain(given[-1] if paired else given)
    if isinstance(nested, int):
        nested, paired = [nested], False
    if not paired and isinstance(nested, list) and nested and all(isinstance(part, int) for part in nested):
        return [[nested] * batch] * interventions
    return nested


def _once(rows: Any, batch: int) -> Any:
    """Of rows that stand there once for each beam, as the original has them in generation, one each."""
    times = len(rows) // batch
    if times < 2 or len(rows) % batch or any(rows[n] != rows[n - n % times] for n in range(len(rows))):
        return rows
    return rows[::times]


def _sizes(nested: Any) -> str:
    """Of nested lists, how many there are on each level, as `[2][3][1]`; `[2][1 or 3][1]` where they differ."""
    sizes = ""
    level = [nested]
    while level and all(isinstance(part, list | tuple) for part in level):
        sizes += f"[{' or '.join(map(str, sorted({len(part) for part in level})))}]"
        level = [inner for part in level for inner in part if inner is not None]
    return sizes


def read_subspaces(
    subspaces: Any, batch: int, interventions: int, repeated: bool = False
) -> list[list[list[int] | None]] | None:
    """Turn the original's `[interventions][batch][directions]` into `[batch][interventions][directions]`.

    A dict for an intervention, as in `[{"idx": ...}]`, is for a class of one's own, in each row's place.

    Args:
        repeated: whether the rows may stand there once for each beam.

    Raises:
        ReftError: another nesting or count.
    """
    nested = _nested(subspaces, batch, interventions)
    try:
        nested = [[rows] * batch if isinstance(rows, dict) else rows for rows in nested]
        if repeated:
            nested = [rows if rows is None else _once(rows, batch) for rows in nested]
        if len(nested) != interventions or any(rows is not None and len(rows) != batch for rows in nested):
            raise TypeError
        if all(rows is None for rows in nested):
            return None
        return [[None if rows is None else rows[row] for rows in nested] for row in range(batch)]
    except TypeError:
        raise ReftError(
            f'expected {{"sources->base": (None, [interventions][batch][directions])}} with {interventions} '
            f"interventions and a batch of {batch}, got {subspaces!r}.",
            setting="subspaces",
        ) from None


def read_unit_locations(
    unit_locations: Any, batch: int, interventions: int, tokens: int, repeated: bool = False
) -> list[list[list[int]]]:
    """Turn the original's nested locations into `[batch][interventions][positions]`, ragged ones filled with -1.

    Args:
        unit_locations: `{"sources->base": (None, L)}` or `{"base": L}`, with L as `[interventions][batch][positions]`,
            or one index or a list of them for all; one row stands for each of a batch. None for an intervention is all
            of its tokens.
        tokens: how many a row has.
        repeated: whether the rows may stand there once for each beam.

    Raises:
        ReftError: another nesting or count; the message shows the expected one.
    """
    nested = _nested(unit_locations, batch, interventions)
    expected = f"expected {_SHAPE} with {interventions} interventions and a batch of {batch}"
    try:
        given = [[list(range(tokens))] * batch if rows is None else rows for rows in nested]
        nested = [rows * batch if len(rows) == 1 else rows for rows in given]
        if repeated:
            nested = [_once(rows, batch) for rows in nested]
        if {len(rows) for rows in nested} - {batch} or len(nested) != interventions:
            raise ReftError(
                f"{expected}, so [{interventions}][{batch}][positions]; got {_sizes(given)}.", setting="unit_locations"
            )
        by_row = [[list(rows[row]) for rows in nested] for row in range(batch)]
        flat = [at for row in by_row for places in row for at in places]
        if not all(type(at) is int and at >= 0 for at in flat):
            raise ReftError(f"{expected} and indices from 0, got {nested}.", setting="unit_locations")
    except TypeError:
        raise ReftError(f"{expected}, got {unit_locations!r}.", setting="unit_locations") from None
    width = max((len(places) for row in by_row for places in row), default=0)
    return [[places + [-1] * (width - len(places)) for places in row] for row in by_row]
