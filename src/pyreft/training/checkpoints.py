"""Checkpoints of a training job: complete or absent, whatever interrupts the writing of one."""

import errno
import hashlib
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ReftError, check_type
from ..files.adapter import read_config_data, read_shapes
from ..files.text import read_json
from .trainer import ReftTrainerForCausalLM, ReftTrainerForSequenceClassification

LAST_FILE = "trainer_state.json"  # what the Trainer writes last
DATA_FILE = "data.json"  # how many rows it was trained on, and their hash

# what training cannot go on without, beside the adapter and `LAST_FILE`
_NEEDED = ("optimizer.pt", "scheduler.pt")
_STATE: dict[str, tuple[type, ...]] = {
    "global_step": (int,),
    "max_steps": (int,),
    "epoch": (float,),
    "log_history": (list,),
    "stateful_callbacks": (dict,),
}


def last_complete(directory: Path) -> str | None:
    """Return the newest checkpoint in a directory that training can go on from; none if there is none.

    A later one that is damaged or was cut off is told of in a warning.
    """
    found = {}
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if number := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d{{1,18}})", path.name):
            found[int(number[1])] = path
    for _, path in sorted(found.items(), reverse=True):
        if (problem := _problem(path)) is None:
            return str(path)
        warnings.warn(f"{path} is passed over: {problem}", stacklevel=2)
    return None


def _problem(checkpoint: Path) -> str | None:
    try:
        check_complete(checkpoint)
    except ReftError as error:
        return str(error)
    return None


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint that a kill or a full disk cut off, or that was damaged later.

    Raises:
        ReftError: a file that is missing or damaged.
    """
    _check_state(checkpoint / LAST_FILE)
    read_config_data(checkpoint)
    read_shapes(checkpoint)
    if (checkpoint / DATA_FILE).exists():
        _read_facts(checkpoint)
    for path in [*(checkpoint / name for name in _NEEDED), *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not path.is_file():
            raise ReftError(f"{path}: there is no such file.")
        try:
            with zipfile.ZipFile(path) as parts:  # as torch.save writes it, with what it holds at its end
                damaged = parts.testzip()
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            damaged = str(error)
        if damaged:
            raise ReftError(f"{path}: the file is damaged or was cut short ({damaged}).")


def _check_state(path: Path) -> None:
    state = read_json(path)
    for name, kinds in _STATE.items():
        check_type(f"{path}: {name}", state.get(name), *kinds)
    for entry in state["log_history"]:
        check_type(f"{path}: log_history", entry, dict)
        check_type(f"{path}: log_history: step", entry.get("step"), int)
    try:
        TrainerState(**state)
    except (TypeError, ValueError, AttributeError) as error:
        raise ReftError(f"{path}: this is no state of a Trainer ({error}).") from None
    if state["global_step"] != steps_done(str(path.parent)):
        raise ReftError(f"{path}: global_step: expected that of the directory's name, got {state['global_step']}.")


def steps_done(checkpoint: str) -> int:
    """How many steps a checkpoint was made after."""
    return int(checkpoint.rpartition("-")[2])


def check_same_rows(checkpoint: str, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse to go on from a checkpoint that was trained on other rows; one that does not say it is taken.

    Raises:
        ReftError: with the numbers of rows.
    """
    path = Path(checkpoint) / DATA_FILE
    if not path.is_file():
        return
    before, now = _read_facts(Path(checkpoint)), _facts(rows)
    if before != now:
        raise ReftError(
            f"resume: {checkpoint} was trained on other data ({before['rows']:,} rows, now {now['rows']:,}); resume "
            "with the same data, or train to another output."
        )


def _read_facts(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / DATA_FILE
    facts = read_json(path)
    check_type(f"{path}: rows", facts.get("rows"), int)
    check_type(f"{path}: sha256", facts.get("sha256"), str)
    return facts


def _facts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


class Checkpointing(Trainer):
    """A trainer that takes back a checkpoint it could not complete, and says in each what it was trained on."""

    @cached_property
    def _data(self) -> str:
        rows: Any = self.train_dataset
        return json.dumps(_facts(rows))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with disk_full_as_os_error():
                if self.args.should_save:
                    shutil.rmtree(target, ignore_errors=True)  # one that was passed over, of which nothing may stay
                    target.mkdir(parents=True)
                    (target / DATA_FILE).write_text(self._data, "utf-8")
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and _problem(target):
                shutil.rmtree(target, ignore_errors=True)
            raise


class CheckpointingTrainer(Checkpointing, ReftTrainerForCausalLM):
    """The trainer of jobs that learn to generate."""


class CheckpointingClassifierTrainer(Checkpointing, ReftTrainerForSequenceClassification):
    """The trainer of jobs that learn to classify."""


@contextmanager
def disk_full_as_os_error() -> Iterator[None]:
    """Raise an `OSError` with `errno.ENOSPC` where a library that writes tells of a full disk in its own way."""
    try:
        yield
    except Exception as error:
        # torch names no cause when a part of a file cannot be written
        if not any(text in str(error) for text in ("No space left", "os error 28", "PytorchStreamWriter failed")):
            raise
        raise OSError(errno.ENOSPC, "No space left on device") from error
