"""A checkpoint of a training: an adapter and what the Trainer writes beside it, of which any file may be cut off.

Which training a checkpoint belongs to is not known here.
"""

import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ReftError, check_type
from .adapter import read_config_data, read_shapes
from .text import read_json

LAST_FILE = "trainer_state.json"  # what the Trainer writes last
DATA_FILE = "data.json"  # how many rows a job was trained on, their hash, its settings, its base model
OPTIMIZER = ("optimizer.pt", "scheduler.pt")

_STATE: dict[str, tuple[type, ...]] = {"global_step": (int,), "max_steps": (int,), "log_history": (list,)}


def last_complete(directory: Path, needed: Sequence[str] = OPTIMIZER) -> str | None:
    """Return the newest checkpoint in a directory that training can go on from; none if there is none.

    A later one that is damaged or was cut off is told of in a warning.

    Args:
        directory: where the checkpoints are, as `checkpoint-<steps>`.
        needed: see `check_complete`.
    """
    found = {}
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if number := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d{{1,18}})", path.name):
            found[int(number[1])] = path
    for _, path in sorted(found.items(), reverse=True):
        if (problem := problem_of(path, needed)) is None:
            return str(path)
        warnings.warn(f"{path} is passed over: {problem}", stacklevel=2)
    return None


def problem_of(checkpoint: Path, needed: Sequence[str] = OPTIMIZER) -> str | None:
    """What `check_complete` says of a checkpoint, nothing if it is complete."""
    try:
        check_complete(checkpoint, needed)
    except ReftError as error:
        return str(error)
    return None


def check_complete(checkpoint: Path, needed: Sequence[str] = OPTIMIZER) -> None:
    """Refuse a checkpoint that a kill or a full disk cut off, or that was damaged later.

    Args:
        checkpoint: its directory.
        needed: files that must be there beside the adapters and the state of the Trainer.

    Raises:
        ReftError: a file that is missing or damaged.
    """
    _check_state(checkpoint / LAST_FILE)
    for adapter in {path.parent for path in checkpoint.rglob(CONFIG_NAME)} or {checkpoint}:
        read_config_data(adapter)
        read_shapes(adapter)
    if (checkpoint / DATA_FILE).exists():
        read_facts(checkpoint)
    for path in [*(checkpoint / name for name in needed), *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not path.is_file():
            raise ReftError(f"{path}: there is no such file.")
        try:
            with zipfile.ZipFile(path) as parts:  # as torch.save writes it, with the list of its parts at the end
                damaged = parts.testzip()
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            damaged = str(error)
        if damaged:
            raise ReftError(f"{path}: the file is damaged or was cut short ({damaged}).")


def steps_done(checkpoint: str) -> int:
    """How many steps a checkpoint was made after."""
    return int(checkpoint.rpartition("-")[2])


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Return how many `rows` a checkpoint was trained on, and their `sha256`.

    Also, where it says them, the training's `settings` and a digest of its `base` model.

    Raises:
        ReftError: the file is missing or damaged.
    """
    path = checkpoint / DATA_FILE
    facts = read_json(path)
    check_type(f"{path}: rows", facts.get("rows"), int)
    check_type(f"{path}: sha256", facts.get("sha256"), str)
    check_type(f"{path}: settings", facts.get("settings", {}), dict)
    check_type(f"{path}: base", facts.get("base", ""), str)
    return facts


def _check_state(path: Path) -> None:
    state = read_json(path)
    for name, kinds in _STATE.items():
        check_type(f"{path}: {name}", state.get(name), *kinds)
    for name, kind in (("epoch", float), ("stateful_callbacks", dict)):
        if state.get(name) is not None:
            check_type(f"{path}: {name}", state[name], kind)
    for entry in state["log_history"]:
        check_type(f"{path}: log_history", entry, dict)
        check_type(f"{path}: log_history: step", entry.get("step"), int)
    try:
        TrainerState(**state)
    except (TypeError, ValueError, AttributeError) as error:
        raise ReftError(f"{path}: this is no state of a Trainer ({error}).") from None
    if state["global_step"] != steps_done(str(path.parent)):
        raise ReftError(f"{path}: global_step: expected that of the directory's name, got {state['global_step']}.")
