"""Rows of fields out of files: JSON Lines, JSON, CSV, parquet, a data set on disk or on the hub, each with its place.

Knows nothing of what the fields mean.
"""

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import ReftError, is_disk_full
from ..files.text import check_file, parse_json, parse_values, repeated, too_deep
from .encodings import open_text

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
CELLS = (".csv", ".tsv")  # in which all is text
MISSING = ("nan", "NaN", "<NA>")  # of these, what pandas writes into a cell for nothing if asked for a text
_SEPARATORS = (",", ";", "\t", "|")
_LARGEST = 2**31 - 1  # characters of a field of a CSV
_NAMED = re.compile(r'"?sep=(.)"?\r?\n?', flags=re.I)  # a first line with which Excel names one
_QUOTED = re.compile(r' +".*" *')  # what was meant to be in quotes
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^:]*))?(:(?P<split>.+))?")

Row = tuple[str, dict[str, Any] | ReftError]  # where it stands, and its fields or what is wrong with it


def read_rows(source: str | Path, encoding: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file with its place; what fields it has is not looked at.

    Raises:
        ReftError: as `try_rows`, and for the first row that is wrong.
    """
    for where, row in try_rows(source, encoding):
        if isinstance(row, ReftError):
            raise row
        yield where, row


def try_rows(source: str | Path, encoding: str | None = None, known: Collection[str] = ()) -> Iterator[Row]:
    """Each row of a file with its place, or what is wrong with it; files of lines are read as they are asked for.

    Args:
        source: a file, a directory of `save_to_disk`, or a data set of the hub as `name`, `name:configuration` or
            `name:configuration:split`, read from there row by row.
        encoding: of a text file, if it does not say it itself.
        known: names of fields, by which the separator of a CSV is told.

    Raises:
        ReftError: a file that is missing or of another kind, or whose rows cannot be told apart.
    """
    path = Path(source)
    kind = path.suffix.lower()
    if (path / "state.json").is_file():
        return _saved(path)
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(path / split.name) for split in sorted(path.iterdir()) if split.is_dir())
        raise ReftError(f"{path}: this data set has several splits; name one of them: {splits}.")
    if path.is_dir():
        raise ReftError(f"{path}: this is a directory; expected a file in it, ending in {', '.join(ENDINGS)}.")
    if kind not in ENDINGS:
        if not path.exists() and (named := _HUB.fullmatch(str(source))):
            return _hub(named["name"], named["config"] or None, named["split"] or "train")
        raise ReftError(
            f"{path}: expected a file ending in {', '.join(ENDINGS)}, or a data set of the hub as owner/name, got "
            f"{path.suffix or 'no ending'!r}."
        )
    if kind == ".parquet":
        return _parquet(path, known)
    if kind in CELLS:
        return _csv(path, encoding, known)
    return (_json if kind == ".json" else _json_lines)(path, encoding, known)


def _json_lines(path: Path, encoding: str | None, known: Collection[str]) -> Iterator[Row]:
    """An object a line; or, by another name than its own, a list of objects, or objects that have no line each."""
    with open_text(path, encoding) as file:
        begins = next((line for line in file if line.strip()), "")
    if begins.lstrip().startswith(("[", "{")) and isinstance(_object(begins, str(path)), ReftError):
        rows: list[Row] = []
        with suppress(ReftError):  # then each line is told of
            rows = list(_json(path, encoding, known))
        if any(isinstance(row, dict) for _, row in rows):
            yield from rows
            return
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _object(line, where)


def _object(line: str, where: str) -> dict[str, Any] | ReftError:
    try:
        return _fields(parse_json(line.removeprefix("\ufeff"), where), where)  # the mark of a file put behind another
    except ReftError as error:
        return error


def _fields(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ReftError(f"{where}: expected an object with fields, got {type(value).__name__}.")
    if too_deep(value):
        raise ReftError(f"{where}: the values are nested too deeply.")
    return value


def _json(path: Path, encoding: str | None, known: Collection[str]) -> Iterator[Row]:
    """A list of objects; the one list of them, or the columns, that an object holds; or JSON Lines by another name.

    Or objects one behind the other, over several lines each, or with a comma between.
    """
    with open_text(path, encoding) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        value = parse_json(text, str(path), lines=True)
    except ReftError:
        first = text.lstrip().split("\n", 1)[0]
        if isinstance(_object(first, str(path)), dict):
            yield from _json_lines(path, encoding, known)
            return
        value = []
        with suppress(ReftError):  # then the file is told of as a whole
            value = parse_values(text, str(path))
        if not (value and all(isinstance(row, dict) for row in value)):
            raise
    if isinstance(value, dict):
        lists = [held for held in value.values() if isinstance(held, list) and held and isinstance(held[0], dict)]
        row = any(name.strip().lower() in known for name in value)  # a turn or a tool is no row
        value = lists[0] if len(lists) == 1 and not row else _of_columns(value) or [value]
    if not isinstance(value, list):
        raise ReftError(f"{path}: expected a list of objects, got {type(value).__name__}.")
    for number, row in enumerate(value, 1):
        where = f"{path}, row {number}"
        try:
            yield where, _fields(row, where)
        except ReftError as error:
            yield where, error


def _of_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object that holds columns, as `datasets` and pandas write them; none of another object.

    A column is a list, none of whose values has fields, as a turn has; or an object from row numbers to values.
    """
    if all(isinstance(held, dict) for held in value.values()):
        numbers = [list(held) for held in value.values()]
        columns = [list(held.values()) for held in value.values()]
        fits = all(of_one == numbers[0] for of_one in numbers) and all(map(str.isdigit, numbers[0] if numbers else ()))
    else:
        columns = [held for held in value.values() if isinstance(held, list)]
        fits = len(columns) == len(value) and len({len(column) for column in columns}) == 1
        fits = fits and not any(isinstance(held, dict) for column in columns for held in column)
    return [dict(zip(value, values, strict=True)) for values in zip(*columns, strict=True)] if fits else []


def _csv(path: Path, encoding: str | None, known: Collection[str]) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST)  # of all readers of the process, which have no other way
    with open_text(path, encoding) as file:
        skipped, header, named = 0, file.readline(), None
        while header and (not header.strip() or (named := _NAMED.fullmatch(header))):
            skipped, header = skipped + 1, file.readline()
        separator, spaced = _separator(header, known, named[1] if named else _SEPARATORS)
        text: list[str] = []  # of a row, as it stands
        lines = csv.reader(
            _noted(chain((header,), file), text), delimiter=separator, skipinitialspace=spaced, strict=True
        )
        columns: list[str] | None = None
        begins = skipped + 1
        try:
            for values in lines:
                where, begins = f"{path}, line {begins}", skipped + lines.line_num + 1
                written = "".join(text)
                text.clear()
                if columns is None:
                    columns = [name.strip() for name in values]
                    _check_columns(columns, str(path), known)
                    read = [number for number, name in enumerate(columns) if name in known or name.lower() in known]
                elif not any(value.strip() for value in values):
                    continue  # as a spreadsheet writes below its table
                elif len(values) != len(columns):
                    came = f"{_counted(columns)} as in the first line, got {_counted(values)}"
                    hint = f"a text with {separator!r} in it stands in double quotes."
                    yield where, ReftError(f"{where}: expected {came}; {hint}")
                elif not spaced and any(_QUOTED.fullmatch(values[n]) and values[n] in written for n in read):
                    hint = "take it out, else the quotes are a part of the text."
                    yield where, ReftError(f"{where}: a text in quotes has a space before it; {hint}")
                else:
                    yield where, dict(zip(columns, values, strict=True))
        except csv.Error as error:
            hint = " A quote within a text is written twice." if "expected" in str(error) else ""
            hint = " A quote that opens there is not closed." if "unexpected end" in str(error) else hint
            raise ReftError(f"{path}, line {begins}: this is not valid CSV ({error}).{hint}") from None


def _noted(lines: Iterable[str], text: list[str]) -> Iterator[str]:
    """The lines, each put into a text when it is read."""
    for line in lines:
        text.append(line)
        yield line


def _counted(columns: Sequence[str]) -> str:
    return f"{len(columns)} column{'s' if len(columns) > 1 else ''}"


def _check_columns(names: Sequence[str], where: str, known: Collection[str]) -> None:
    """Refuse two columns of one name, unless they mean nothing here."""
    means = [name for name in names if (name and not known) or name in known or name.lower() in known]
    if (name := repeated(means)) is not None:
        raise ReftError(f"{where}: two columns are called {name!r}; rename one of them.")


def _separator(header: str, known: Collection[str], separators: Sequence[str]) -> tuple[str, bool]:
    """That which finds the most known fields in the first line, else the most columns; and whether a space follows."""

    def names(separator: str) -> list[str]:
        return next(csv.reader([header], delimiter=separator), [])

    def found(separator: str) -> tuple[int, int]:
        return len({name.strip().lower() for name in names(separator)} & set(known)), len(names(separator))

    best = max(separators, key=found)
    behind = names(best)[1:]
    return best, bool(behind) and all(name.startswith(" ") for name in behind)


def _parquet(path: Path, known: Collection[str]) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    check_file(path)
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path), known)
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: without_nulls(held) for name, held in row.items()}
    except (pyarrow.ArrowException, OSError, OverflowError) as error:  # a date that Python does not have
        raise ReftError(f"{path}: this is not a readable parquet file ({error}).") from None


def _saved(path: Path) -> Iterator[Row]:
    """What `save_to_disk` of a data set wrote."""
    import datasets
    import pyarrow

    try:
        rows = datasets.load_from_disk(str(path)).with_format(None)
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        raise ReftError(f"{path}: this is not a readable data set of `save_to_disk` ({error}).") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", {name: without_nulls(held) for name, held in row.items()}


def _hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", {field: without_nulls(held) for field, held in row.items()}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ReftError) or is_disk_full(error):
            raise
        raise ReftError(
            f"{name}: there is no such file, and no data set of this name could be read from the hub ({error})."
        ) from None


def without_nulls(value: Any) -> Any:
    """A value of a table without the nulls that its columns put where a row has no such field."""
    if isinstance(value, dict):
        return {name: without_nulls(held) for name, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value
