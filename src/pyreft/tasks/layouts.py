"""The public layouts of the suites' data: JSON arrays, JSON Lines and tab-separated columns, each row with its place.

Knows files and fields; what a row means to a task is the task's to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.files import read_rows
from ..errors import ReftError, did_you_mean
from ..files.text import read_text

LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters"


@dataclass(frozen=True)
class Row:
    """One row of a file: the fields that were asked for, and where they stand, for messages."""

    where: str
    fields: dict[str, Any]


def find(directory: str | Path, names: Sequence[str], source: str) -> Path:
    """Return the first of several places in a directory that holds a file.

    Args:
        names: where the file may lie, the usual place first.
        source: where the data can be had, for the message.

    Raises:
        ReftError: no such directory, or none of the files.
    """
    if not Path(directory).is_dir():
        raise ReftError(
            f"{directory} is not a directory. Expected {names[0]} in it; get it from {source}.", setting="data_dir"
        )
    for name in names:
        if (path := Path(directory) / name).is_file():
            return path
    folder = Path(directory) / Path(names[0]).parent
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = f"{folder} holds {', '.join(there[:6]) or 'nothing'}" if folder.is_dir() else f"there is no {folder}"
    raise ReftError(f"expected {' or '.join(names)} in {directory}; {found}. Get it from {source}.", setting="data_dir")


def read_json(path: Path, fields: Sequence[str]) -> list[Row]:
    """Return the rows of a JSON array, or of JSON Lines if the name ends in `.jsonl`, with the fields asked for.

    Raises:
        ReftError: not JSON, not of this shape, or a row without a field, with the file, the row and the field.
    """
    rows = []
    for where, data in read_rows(path):
        for name in fields:
            if name not in data:
                raise ReftError(f"{where}: the field {name!r} is missing.{did_you_mean(name, data)}")
        rows.append(Row(where, data))
    if not rows:
        raise ReftError(f"{path}: the file has no rows.")
    return rows


def read_tsv(path: Path, fields: Sequence[str | int], *, ragged: bool = False) -> list[Row]:
    """Return the rows of tab-separated columns, unquoted.

    Args:
        fields: the columns by their names in the first line; or by their numbers, if there is no such line.
        ragged: leave out rows with too few columns instead of refusing them.

    Raises:
        ReftError: no such column, or a row with too few, with the file, the line and the column.
    """
    lines = read_text(path).split("\n")
    columns = {name: number for number, name in enumerate(lines[0].rstrip("\r").split("\t"))}
    by_name = isinstance(fields[0], str)
    for name in fields:
        if by_name and name not in columns:
            raise ReftError(
                f"{path}, line 1: expected a column {name!r}, got {', '.join(columns)}.{did_you_mean(name, columns)}"
            )
    places = {str(name): columns[str(name)] if by_name else int(name) for name in fields}
    rows = []
    for number, line in enumerate(lines[by_name:], 1 + by_name):
        cells = line.rstrip("\r").split("\t")
        if not line.strip() or (ragged and len(cells) <= max(places.values())):
            continue
        for name, at in places.items():
            if at >= len(cells):
                raise ReftError(
                    f"{path}, line {number}: there is no column {name!r}; the line has {len(cells)} columns, "
                    f"expected {at + 1} or more, separated by tabs."
                )
        rows.append(Row(f"{path}, line {number}", {name: cells[at] for name, at in places.items()}))
    if not rows:
        raise ReftError(f"{path}: the file has no rows.")
    return rows


def text_of(row: Row, name: str, *, empty: bool = False) -> str:
    """A field that has to be text.

    Args:
        empty: it may be empty, as a few answers of the published training files are.

    Raises:
        ReftError: it is something else, or empty where it may not.
    """
    value = row.fields[name]
    if not isinstance(value, str) or not (value.strip() or empty):
        shown = "an empty text" if isinstance(value, str) else type(value).__name__
        raise ReftError(f"{row.where}: the field {name!r} should be text, got {shown}.")
    return value


def answer_of(row: Row) -> str:
    """The field `answer`: a text or a number, or a list of one, as older files have it."""
    value = row.fields["answer"]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ReftError(f"{row.where}: the field 'answer' should be a text or a number, got {value!r}.")
    return str(value).strip()
