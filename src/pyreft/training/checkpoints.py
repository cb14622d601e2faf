"""Checkpoints of a training job: complete or absent, whatever interrupts the writing of one."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .trainer import ReftTrainerForCausalLM, ReftTrainerForSequenceClassification

LAST_FILE = "trainer_state.json"  # what the Trainer writes last: a checkpoint with this file is complete


def last_complete(directory: Path) -> str | None:
    """Return the newest checkpoint in a directory that training can go on from; none if there is none."""
    found = []
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if number and (path / LAST_FILE).is_file():
            found.append((int(number[1]), str(path)))
    return max(found)[1] if found else None


class Checkpointing(Trainer):
    """A trainer that takes back a checkpoint it could not complete."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with disk_full_as_os_error():
                super()._save_checkpoint(model, trial)
        except BaseException:
            if not (target / LAST_FILE).is_file():
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
