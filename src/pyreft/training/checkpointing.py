"""Checkpoints of a training job: complete or absent, whatever interrupts the writing of one."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ReftError, is_disk_full
from ..files.checkpoints import DATA_FILE, problem_of, read_facts
from .trainer import ReftTrainer, ReftTrainerForCausalLM, ReftTrainerForSequenceClassification


def check_same_training(
    checkpoint: str, rows: Sequence[dict[str, Any]], settings: Mapping[str, Any], base: str
) -> None:
    """Refuse to go on from a checkpoint of other rows, settings or weights; one that does not say it is taken.

    Args:
        rows: of the training.
        settings: by name, those that a training cannot change on its way.
        base: a digest of the base model.

    Raises:
        ReftError: with the numbers of rows, or the first setting that differs.
    """
    path = Path(checkpoint) / DATA_FILE
    if not path.is_file():
        return
    before = read_facts(Path(checkpoint))
    now = facts_of(rows)
    if before["rows"] != now["rows"] or before["sha256"] != now["sha256"]:
        raise ReftError(
            f"{checkpoint} was trained on other data ({before['rows']:,} rows, now {now['rows']:,}); resume "
            "with the same data, or train to another output.",
            setting="resume",
        )
    earlier = before.get("settings", {})
    if earlier:  # what all were before it could be chosen
        earlier = {"lr_scheduler_type": "linear", "adam_beta1": 0.9} | earlier
    for name, value in settings.items():
        if name in earlier and earlier[name] != value:
            raise ReftError(
                f"{checkpoint} was made with {name} = {earlier[name]!r}, now it is {value!r}; a training goes on with "
                "the settings it began with: give the same, or train to another output.",
                setting="resume",
            )
    if before.get("base", base) != base:
        raise ReftError(
            f"{checkpoint} was trained on another base model, of the same shape and with other weights; resume with "
            "the same base model, or train to another output.",
            setting="resume",
        )


def facts_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many `rows` there are, and the `sha256` of their ids and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


class Checkpointing(ReftTrainer):
    """A trainer that takes back a checkpoint it could not complete, and says in each what it was trained on."""

    settings: Mapping[str, Any] = {}  # of the training, and
    base: str | None = None  # of the base model, see `check_same_training`

    @cached_property
    def _data(self) -> str:
        rows: Any = self.train_dataset
        base = {} if self.base is None else {"base": self.base}
        return json.dumps({**facts_of(rows), **base, "settings": dict(self.settings)})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_parameters()  # before an earlier one of this step is removed
        target = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with disk_full_as_os_error():
                if self.args.should_save:
                    shutil.rmtree(target, ignore_errors=True)  # one that was passed over, of which nothing may stay
                    target.mkdir(parents=True)
                    (target / DATA_FILE).write_text(self._data, "utf-8")
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and problem_of(target):
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
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device") from error
