"""What an adapter was trained with, as `recipe.json` beside it: for evaluation, and to train it again.

Adapters of the suites have one, and those of LoRA, whose own config cannot say how prompts are written.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import read_config_data
from ..errors import ReftError
from .recipes import decoding_of
from .settings import TrainingJob, check_decoding

FILE = "recipe.json"
_NOT_KEPT = ("output", "resume", "overwrite", "reach_directory", "reach_memory")


def write_record(directory: Path, job: TrainingJob) -> None:
    """Write the settings of a job beside its adapter."""
    kept = {name: value for name, value in asdict(job).items() if name not in _NOT_KEPT and value is not None}
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


def read_decoding(directory: str | os.PathLike, suite: str) -> dict[str, Any]:
    """Return how an adapter generates answers to a suite: as its own recipe says, else as the suite's shipped one.

    Raises:
        ReftError: the record is damaged.
    """
    record = read_record(directory)
    if record.get("suite") == suite and record.get("decoding"):
        return check_decoding(record["decoding"], f"{Path(directory) / FILE}: decoding")
    return decoding_of(suite)


def read_format(directory: str | os.PathLike) -> Any:
    """Return how prompts were written when an adapter was trained, none if it does not say."""
    return read_config_data(directory).get("prompt_format") or read_record(directory).get("format")
