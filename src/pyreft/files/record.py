"""What an adapter was trained with, as `recipe.json` beside it: for evaluation, and to train it again.

Adapters of the suites have one, and those of LoRA, whose own config cannot say how prompts are written.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import check_type
from .adapter import read_config_data
from .text import read_json
from .together import reading

FILE = "recipe.json"
_NOT_KEPT = ("output", "resume", "overwrite", "reach_directory", "reach_memory")
# what evaluation asks of it
_READ = {
    "suite": str,
    "task": str,
    "format": str,
    "dtype": str,
    "seed": int,
    "max_length": int,
    "decoding": dict,
}


def write_record(directory: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Write the settings of a training beside its adapter."""
    kept = {name: value for name, value in settings.items() if name not in _NOT_KEPT and value is not None}
    (Path(directory) / FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read_record(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the settings that an adapter was trained with; empty if it has none beside it.

    Raises:
        ReftError: the file is damaged, or a setting that is read from it has a value of another type.
    """
    with reading(directory) as place:
        path = place / FILE
        record = read_json(path) if path.exists() else {}
    for name, kind in _READ.items():
        if record.get(name) is not None:
            check_type(f"{path}: {name}", record[name], kind)
    return record


def read_format(directory: str | os.PathLike) -> Any:
    """Return how prompts were written when an adapter was trained, none if it does not say."""
    return read_config_data(directory).get("prompt_format") or read_record(directory).get("format")
