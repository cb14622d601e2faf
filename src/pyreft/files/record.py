"""What an adapter was trained with, as `recipe.json` beside it: for evaluation, and to train it again.

Adapters of the suites have one, and those of LoRA, whose own config cannot say how prompts are written.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ReftError
from .adapter import read_config_data

FILE = "recipe.json"
_NOT_KEPT = ("output", "resume", "overwrite", "reach_directory", "reach_memory")


def write_record(directory: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a training beside its adapter."""
    kept = {name: value for name, value in settings.items() if name not in _NOT_KEPT and value is not None}
    (directory / FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read_record(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the settings that an adapter was trained with; empty if it has none beside it.

    Raises:
        ReftError: the file is damaged.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReftError(f"{path}: the file is damaged, it is not JSON ({error}).") from None
    return record if isinstance(record, dict) else {}


def read_format(directory: str | os.PathLike) -> Any:
    """Return how prompts were written when an adapter was trained, none if it does not say."""
    return read_config_data(directory).get("prompt_format") or read_record(directory).get("format")
