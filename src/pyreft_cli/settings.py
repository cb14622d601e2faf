"""The settings of a job as a command gets them: options, and a YAML file of them."""

import re
from pathlib import Path
from typing import Any

import typer

from pyreft.errors import ReftError
from pyreft.files.text import check_file, parse_yaml, repeated

PATHS = ("data", "data_dir", "output", "model", "adapter", "file", "validation", "reach_directory", "config")
_OTHERS = ("recipe", "config", "rows", "quiet", "as_json")  # the parameters of a command that are no settings


def at_home(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters with `~/` spelled out in paths, as no shell does it behind `=`, nor anyone in a file."""
    paths = {name: held for name, held in given.items() if name in PATHS and str(held).startswith("~/")}
    return given | {name: type(held)(Path(held).expanduser()) for name, held in paths.items()}


def read_settings(params: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """The settings of a file and of a command's parameters, which win; those that are not given are left out."""
    given = {name: value for name, value in params.items() if name not in _OTHERS and value is not None}
    settings = at_home(read_config(config)) | given
    check_positions(settings.get("positions"))
    return settings


def read_config(path: Path | None) -> dict[str, Any]:
    """The settings of a file by their names; none without a file."""
    if path is None:
        return {}
    import yaml

    try:
        check_file(path)
        settings = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except ReftError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from None
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}.", param_hint="--config") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, a date that is none, nested too deeply
        raise typer.BadParameter(f"{path} is not valid YAML: {error}", param_hint="--config") from None
    if not isinstance(settings, dict):
        raise typer.BadParameter(f"{path} should hold 'name: value' lines.", param_hint="--config")
    names = [str(name).replace("-", "_") for name in settings]
    if (name := repeated(names)) is not None:
        raise typer.BadParameter(f"{path} has {name!r} twice.", param_hint="--config")
    return dict(zip(names, settings.values(), strict=True))


def check_positions(rule: Any) -> None:
    """Refuse at once what cannot be a position rule; the library, which would say the same, takes seconds to load."""
    text = str(rule).replace(" ", "").lower()
    if rule is None or re.fullmatch(r"f\d+(\+l\d+)?|l\d+|prompt|all", text):
        return
    number = re.search(r"\d+", text)
    hint = f" Did you mean '{'f' if text.startswith('f') else 'l'}{number[0]}'?" if number else ""
    expected = "expected f<n>, l<n>, f<n>+l<m>, prompt or all"
    raise typer.BadParameter(f"{expected}, got {str(rule)!r}.{hint}", param_hint="--positions")
