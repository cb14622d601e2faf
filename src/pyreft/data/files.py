"""Data files in: JSON Lines, JSON or CSV as examples of a prompt and its answer, each with the place it stands at.

Knows files and fields, nothing of tokenizers or models.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ReftError, did_you_mean
from ..files.text import parse_json, read_text

Format = Literal["text", "chat", "alpaca"]
FIELDS = {
    "prompt and completion": ("prompt", "completion"),
    "instruction, input and output": ("instruction", "output"),
    "messages": ("messages",),
}
ENDINGS = (".jsonl", ".json", ".csv")
FORMATS: tuple[Format, ...] = ("text", "chat", "alpaca")


@dataclass(frozen=True)
class Example:
    """One row of a data file.

    Args:
        where: the file and line, for messages.
        format: how the prompt is meant: literal text, a chat, or an instruction in Alpaca's template.
        messages: the turns of a chat, the answer last; else one user turn and the answer.
    """

    where: str
    format: Format
    messages: tuple[dict[str, str], ...]

    @property
    def prompt(self) -> str:
        """The last turn before the answer."""
        return self.messages[-2]["content"]

    @property
    def completion(self) -> str:
        """The answer."""
        return self.messages[-1]["content"]


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """An instruction, and what it is about if anything, in the template of the Alpaca data set."""
    about = "that describes a task"
    if given:
        about += ", paired with an input that provides further context"
    asked = f"### Instruction:\n{instruction}\n\n"
    if given:
        asked += f"### Input:\n{given}\n\n"
    return (
        f"Below is an instruction {about}. Write a response that appropriately completes the request.\n\n"
        f"{asked}### Response:\n"
    )


def read_examples(path: str | Path) -> list[Example]:
    """Return the examples of a `.jsonl`, `.json` or `.csv` file.

    A row has `prompt` and `completion`; or `instruction`, `output` and perhaps `input`; or chat `messages`, a list
    of `{"role", "content"}` that ends with the assistant.

    Raises:
        ReftError: a file that is missing, empty or of another kind; a broken line or a missing field, with its place.
    """
    examples = [_example(row, where) for where, row in read_rows(Path(path))]
    if not examples:
        raise ReftError(f"{path}: the file has no examples.")
    if len({example.format for example in examples}) > 1:
        odd = next(e for e in examples if e.format != examples[0].format)
        raise ReftError(f"{odd.where}: rows of different kinds in one file; the first has others than this one.")
    return examples


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """Return the prompts of a file, each with its further input or an empty text.

    One prompt a line of a `.txt`; of the other kinds the field `prompt`, or `instruction` with perhaps `input`.

    Raises:
        ReftError: as `read_examples`.
    """
    if Path(path).suffix.lower() == ".txt":
        prompts = [(line, "") for line in read_text(Path(path)).split("\n") if line.strip()]
    else:
        prompts = []
        for where, row in read_rows(Path(path)):
            name = next((name for name in ("prompt", "instruction") if name in row), None)
            if name is None:
                raise ReftError(f"{where}: expected a field 'prompt' or 'instruction', got {', '.join(row) or 'none'}.")
            prompts.append((_string(row, name, where), _string(row, "input", where) if row.get("input") else ""))
    if not prompts:
        raise ReftError(f"{path}: the file has no prompts.")
    return prompts


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a `.jsonl`, `.json` or `.csv` file with its place; what fields it has is not looked at.

    Raises:
        ReftError: as `read_examples`, but for the fields.
    """
    kind = path.suffix.lower()
    if path.is_dir():
        raise ReftError(f"{path}: this is a directory; expected a file in it, ending in {', '.join(ENDINGS)}.")
    if kind not in ENDINGS:
        raise ReftError(f"{path}: expected a file ending in {', '.join(ENDINGS)}, got {path.suffix or 'no ending'!r}.")
    text = read_text(path)
    # a line ends with a line feed alone: JSON and CSV may hold the other separators that splitlines() knows
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey=None)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ReftError(f"{where}: expected {len(reader.fieldnames or [])} columns as in the first line.")
                yield where, row
        except csv.Error as error:
            raise ReftError(f"{path}, line {reader.line_num}: this is not valid CSV ({error}).") from None
    elif kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", _json(line, f"{path}, line {number}")
    elif text.strip():
        rows = _json(text, str(path), list)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ReftError(f"{path}, row {number}: expected an object with fields, got {type(row).__name__}.")
            yield f"{path}, row {number}", row


def _json(text: str, where: str, kind: type = dict) -> Any:
    value = parse_json(text, where, lines=kind is list)
    if not isinstance(value, kind):
        expected = "an object with fields" if kind is dict else "a list of objects"
        raise ReftError(f"{where}: expected {expected}, got {type(value).__name__}.")
    return value


def _example(row: dict[str, Any], where: str) -> Example:
    for names in FIELDS.values():
        if names[0] in row:
            for name in names:
                if name not in row:
                    raise ReftError(
                        f"{where}: the field {name!r} is missing.{did_you_mean(name, row.keys() - {*names})}"
                    )
    if "messages" in row:
        return Example(where, "chat", _turns(row["messages"], where))
    if "prompt" in row:
        prompt, answer, form = _string(row, "prompt", where), _string(row, "completion", where), "text"
    elif "instruction" in row:
        given = _string(row, "input", where) if row.get("input") else ""
        prompt = alpaca_prompt(_string(row, "instruction", where), given)
        answer, form = _string(row, "output", where), "alpaca"
    else:
        expected = "; or ".join(FIELDS)
        raise ReftError(f"{where}: expected the fields {expected}, got {', '.join(map(str, row)) or 'none'}.")
    if not answer:
        raise ReftError(f"{where}: the answer is empty, there is nothing to learn.")
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(where, form, turns)  # type: ignore[arg-type]


def _turns(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    shaped = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not shaped or len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise ReftError(
            f'{where}: expected messages as [{{"role": "user", "content": "..."}}, ...] that end with an answer of '
            "the role 'assistant'."
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)


def _string(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise ReftError(f"{where}: the field {name!r} should be text, got {type(row[name]).__name__}.")
    return row[name]
