"""Data files in: examples of prompts and answers, or prompts alone, each with the place it stands at.

Of many kinds of files (`tables`) and forms of rows (`fields`). Knows nothing of tokenizers or models, and is imported
without them, so that what is wrong with a file is told at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ..errors import ReftError, did_you_mean
from ..files.text import check_characters
from .encodings import open_text
from .fields import (
    KNOWN,
    LABELS,
    Example,
    Names,
    Turns,
    alpaca_prompt,
    bad_answers,
    extras_of,
    plain_names,
    read_fields,
)
from .tables import CELLS, ENDINGS, MISSING, read_rows, try_rows, without_nulls
from .tally import OnError, Tally

__all__ = [
    "Example",
    "Reading",
    "Tally",
    "alpaca_prompt",
    "read_examples",
    "read_prompts",
    "read_rows",
]


@dataclass(frozen=True)
class Reading:
    """How a file of examples is read.

    Args:
        turns: of a chat, learn `each` answer of the assistant with what comes before it, or the `last` alone.
        prompt_field, completion_field: the names of the two columns, of each that is not found by itself.
        encoding: of a text file, if it does not say it itself, such as `cp1252`.
        on_error: whether rows that are wrong `stop` it, all told at once, or are left out (`skip`).
        limit: take the first so many rows.

    Raises:
        ReftError: a value that none of them can have.
    """

    turns: Turns = "each"
    prompt_field: str | None = None
    completion_field: str | None = None
    encoding: str | None = None
    on_error: OnError = "stop"
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("turns", get_args(Turns)), ("on_error", get_args(OnError))):
            value = getattr(self, name)
            if value not in kinds:
                raise ReftError(
                    f"expected {' or '.join(kinds)}, got {value!r}.{did_you_mean(value, kinds)}", setting=name
                )
        if self.prompt_field is not None and self.prompt_field == self.completion_field:
            raise ReftError(
                f"expected another column than that of the prompts, got {self.fields[1]!r}.", setting="completion_field"
            )
        if self.limit is not None and self.limit < 1:
            raise ReftError(f"expected 1 or more, got {self.limit}.", setting="limit")

    @property
    def fields(self) -> Names:
        """The names of the prompt and the completion, None for one that is not given."""
        return self.prompt_field, self.completion_field


def read_examples(path: str | Path, reading: Reading | None = None, tally: Tally | None = None) -> list[Example]:
    """Return the examples of a file, or of a data set of the hub; see `tables.try_rows`.

    A row has `prompt` and `completion`, texts or lists of turns; or `instruction`, `output` and perhaps `input`; or a
    chat, as `messages` of `{"role", "content"}` or `conversations` of `{"from", "value"}`, that ends with the
    assistant. `system`, `history` and `tools` go to the chat template.

    Args:
        tally: is filled with what became of the rows.

    Raises:
        ReftError: a file that is missing, empty or of another kind; the rows that are wrong, with their places.
    """
    reading = reading or Reading()
    tally = tally or Tally(reading.on_error)
    examples: list[Example] = []
    labels: dict[str, dict[str, Any]] = {name: {} for name in LABELS}
    first: str | None = None
    missing = MISSING if Path(path).suffix.lower() in CELLS else ()
    for where, row in try_rows(path, reading.encoding, (*KNOWN, *filter(None, reading.fields))):
        tally.rows += 1
        with tally.watch(where):
            if isinstance(row, ReftError):
                raise row
            check_characters(row, where)
            form, found, unread = read_fields(row, where, turns=reading.turns, fields=reading.fields, missing=missing)
            first = first or form
            if form != first:
                raise ReftError(f"{where}: rows of different kinds in one file; the first has others than this one.")
            examples += found
            for name in unread:
                if name.lower() in LABELS:
                    labels[name.lower()][where] = row[name]
                tally.unread[name] = tally.unread.get(name, 0) + 1
        if reading.limit == tally.rows:
            break
    bad: dict[str, ReftError] = {}
    for label, said in labels.items():
        if found_bad := bad_answers(label, said):
            tally.unread = {name: count for name, count in tally.unread.items() if name.lower() != label}
            bad |= found_bad
    tally.wrong.update(bad)
    tally.errors += bad.values()
    examples = [example for example in examples if (example.row or example.where) not in bad]
    tally.check()
    if not examples:
        if tally.errors:
            raise ReftError(f"{path}: the file has no examples that are right:\n{tally.listed()}", also=tally.also)
        raise ReftError(f"{path}: the file has no examples.")
    if any(example.format == "chat" for example in examples):  # of rows alike, some have a system text or tools
        examples = [replace(example, format="chat") for example in examples]
    return examples


def read_prompts(path: str | Path, encoding: str | None = None) -> list[tuple[str, str]]:
    """Return the prompts of a file, each with its further input or an empty text.

    One prompt a line of a `.txt`; of the other kinds the field `prompt`, or `instruction` with perhaps `input`.

    Raises:
        ReftError: as `read_examples`.
    """
    kind = Path(path).suffix.lower()
    if Path(path).is_file() and kind not in (".txt", *ENDINGS):
        raise ReftError(f"{path}: expected a .txt of prompts in lines, or a file ending in {', '.join(ENDINGS)}.")
    if kind == ".txt":
        with open_text(Path(path), encoding) as file:
            prompts = [(line.rstrip("\r\n"), "") for line in file if line.strip()]
    else:
        prompts = [_prompt(plain_names(without_nulls(row)), where) for where, row in _checked_rows(path, encoding)]
    if not prompts:
        raise ReftError(f"{path}: the file has no prompts.")
    return prompts


def _checked_rows(path: str | Path, encoding: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, row in try_rows(path, encoding, KNOWN):
        if isinstance(row, ReftError):
            raise row
        check_characters(row, where)
        yield where, row


def _prompt(row: dict[str, Any], where: str) -> tuple[str, str]:
    name = next((name for name in ("prompt", "instruction") if name in row), None)
    if name is None:
        raise ReftError(f"{where}: expected a field 'prompt' or 'instruction', got {', '.join(row) or 'none'}.")
    if more := next(iter(extras_of(row)), None):
        raise ReftError(
            f"{where}: the field {more!r} is not read beside a prompt; `pyreft eval` asks rows with it and an answer."
        )
    given = "" if name == "prompt" or row.get("input") is None else row["input"]
    for field, value in ((name, row[name]), ("input", given)):
        if not isinstance(value, str):
            raise ReftError(f"{where}: the field {field!r} should be text, got {type(value).__name__}.")
    return row[name], given
