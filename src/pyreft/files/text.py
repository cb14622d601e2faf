"""Text, JSON and YAML from files that anyone may have written: read whole, or refused with the file and the place.

Knows nothing of what the files mean.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import ReftError

LARGEST = 256 * 2**20  # bytes of a file that describes something; one of a user's data may have more
_BETWEEN = re.compile(r"\s*,?\s*")  # what may stand between two values
_DEEPEST = 64  # how deep the values of such a file may be nested; copies of them recurse


def check_file(path: Path) -> None:
    """Refuse what is not there, and what is no ordinary file, such as a device behind a link.

    Raises:
        ReftError: saying which.
    """
    if path.is_dir():
        raise ReftError(f"{path}: expected a file, this is a directory.")
    if not path.exists():
        raise ReftError(f"{path}: there is no such file.")
    if not path.is_file():
        raise ReftError(f"{path}: expected a file, this is a device or a pipe.")


def read_text(path: Path, largest: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        largest: the most bytes it may have.

    Raises:
        ReftError: no such file, one that cannot be read, is too large or has another encoding.
    """
    check_file(path)
    try:
        if largest is not None and (size := path.stat().st_size) > largest:
            raise ReftError(f"{path}: expected at most {largest:,} bytes, the file has {size:,}.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReftError(f"{path}: the file is not UTF-8 text ({error}).") from None
    except OSError as error:
        raise ReftError(f"{path}: the file cannot be read ({error.strerror}).") from None


def parse_json(text: str, where: str, problem: str = "this is not valid JSON", lines: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: what to parse.
        where: its file, and the line if it is one, for an error.
        problem: what such an error says.
        lines: name the line of the text in it.

    Raises:
        ReftError: it is no JSON, or Python cannot hold it.
    """
    return _parsed(lambda: json.loads(text, object_pairs_hook=_fields), where, problem, lines)


def parse_values(text: str, where: str) -> list[Any]:
    """The values of JSON texts one behind the other, with white space, or a comma, between them.

    Raises:
        ReftError: as `parse_json`.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_fields)

    def values() -> list[Any]:
        found, at = [], 0
        while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            value, at = decoder.raw_decode(text, at)
            found.append(value)
        return found

    return _parsed(values, where, "this is not valid JSON", True)


def _parsed(parse: Callable[[], Any], where: str, problem: str, lines: bool) -> Any:
    """What `parse` gives, or what is wrong with its text."""
    try:
        return parse()
    except json.JSONDecodeError as error:
        where += f", line {error.lineno}" if lines else ""
        why = f"{error.msg} at column {error.colno}"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:  # a number of thousands of digits, or a name that stands there twice
        why = str(error)
    raise ReftError(f"{where}: {problem} ({why}).")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object, none of which hides another."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the name {repeated(name for name, _ in pairs)!r} stands there twice")
    return fields


def repeated(names: Iterable[str]) -> str | None:
    """The first of some names that comes a second time."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def read_json(path: Path, expected: str = "names and their values") -> dict[str, Any]:
    """The fields of a JSON file that describes something, for an error in words what is `expected`.

    Raises:
        ReftError: as `read_text`; a file that is damaged, or that holds something else.
    """
    return parse_fields(read_text(path, LARGEST), path, expected)


def parse_fields(text: str, path: Path, expected: str) -> dict[str, Any]:
    """As `read_json`, from a text that was read from `path`."""
    value = parse_json(text, str(path), "the file is damaged, it is not JSON", lines="\n" in text)
    if not isinstance(value, dict):
        raise ReftError(f"{path}: expected {expected}, this is a list of values or a single one.")
    for name, inner in value.items():
        if too_deep(inner):
            raise ReftError(f"{path}: {name}: the values are nested more than {_DEEPEST} deep.")
    return value


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ReftError: as `read_text`, or a file that is not YAML.
    """
    import yaml

    try:
        return parse_yaml(read_text(path, LARGEST))
    except ReftError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, say
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ReftError(f"{path}: this is not valid YAML ({why}).") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text in which no name stands twice, of which PyYAML would take the last, nor another number.

    Raises:
        YAMLError, ValueError, RecursionError: as PyYAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            """The fields of a mapping; `<<` may stand there more than once."""
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if (name := repeated(key for key in keys if isinstance(key, str) and key != "<<")) is not None:
                raise yaml.YAMLError(f"the name {name!r} stands there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    def number(loader: Any, node: Any) -> float:
        """A number that means what it looks like; YAML 1.1 has `010` for 8 and `1:30` for 90."""
        value = (loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float)(node)
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            raise yaml.YAMLError(
                f"{node.value!r} would be read as {value}; write what is meant, text in quotes{node.start_mark}"
            )
        return value

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number)
    return yaml.load(text, Loader)


def check_characters(value: Any, where: str) -> None:
    """Refuse half a character, which no tokenizer takes: of a pair that was cut, or a byte that is no UTF-8.

    Raises:
        ReftError: with the place in the row.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half, before = ascii(value[error.start]), value[max(error.start - 20, 0) : error.start]
            kind = "of an emoji that was cut in two"
            if "\udc80" <= value[error.start] <= "\udcff":  # Python's sign for a byte of a terminal, or that half
                kind = "of text that is not UTF-8, or " + kind
            raise ReftError(f"{where}: half a character, {half}, as {kind}, after {before!r}; remove it.") from None
    elif isinstance(value, dict):
        for name, held in value.items():
            check_characters(name, where)
            check_characters(held, f"{where}: {name}")
    elif isinstance(value, list):
        for held in value:
            check_characters(held, where)


def too_deep(value: Any) -> bool:
    """Whether a value is nested deeper than anything that people write."""
    level = [value]
    for _ in range(_DEEPEST):
        lists = [list(held.values()) if isinstance(held, dict) else held for held in level]
        level = [inner for held in lists if isinstance(held, list) for inner in held]
        if not level:
            return False
    return True
