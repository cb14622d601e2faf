"""A job's directory before the training: whether it may be written, and what a stopped training goes on from."""

import os
import tempfile
from pathlib import Path

from peft import PeftConfig

from ..errors import ReftError
from ..files.adapter import is_adapter, read_config
from ..files.checkpoints import LAST_FILE, last_complete, steps_done
from ..tuner.config import ReftConfig, shape_differences
from .loss_curve import TABLE
from .settings import TrainingJob

CHECKPOINTS = "checkpoints"
# what a checkpoint and the job that goes on from it have in common
_SAME_REFT = (
    *("layers", "positions", "component", "intervention", "low_rank_dimension", "share_weights"),
    *("intervention_kwargs", "prompt_format", "base_model_shape"),
)
_SAME_LORA = ("r", "lora_alpha", "target_modules")


def check_output(job: TrainingJob) -> str | None:
    """Check that the directory can be written and holds nothing to lose; return the checkpoint to resume from.

    It is one process's.

    Raises:
        ReftError: what stands in the way.
    """
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ReftError(
            f"A job trains in one process, and {launched} were launched. For several, run a program with ReftTrainer: "
            "docs/ecosystem.md shows one."
        )
    output = Path(job.output)
    last = last_complete(output / CHECKPOINTS)
    if job.resume:
        if last is None:
            raise ReftError(
                "there is no checkpoint to resume from; leave out `resume` to start anew.",
                where=str(output),
                also=["resume"],
            )
    elif (is_adapter(output) or last) and not job.overwrite:
        raise ReftError(
            f"this directory already holds {'an adapter' if is_adapter(output) else 'checkpoints'}; "
            "choose another one, or pass `overwrite` to replace it, or `resume` to go on.",
            where=str(output),
            also=["overwrite", "resume"],
        )
    try:
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ReftError(f"{output}: nothing can be written there ({os.strerror(error.errno or 0)}).") from None
    return last if job.resume else None


def check_same(checkpoint: str, now: PeftConfig) -> None:
    """Refuse to go on from a checkpoint that was made with other settings.

    Raises:
        ReftError: naming the first setting that differs.
    """
    before = read_config(checkpoint) if isinstance(now, ReftConfig) else PeftConfig.from_pretrained(checkpoint)
    for name in _SAME_REFT if isinstance(now, ReftConfig) else _SAME_LORA:
        old, new = getattr(before, name, None), getattr(now, name)
        if old != new:
            what = f"with {name} = {old!r}, now it is {new!r}"
            if name == "base_model_shape":
                what = f"for another base model: this one has {shape_differences(old, new)}"
            raise ReftError(
                f"{checkpoint} was made {what}; resume with the same settings, or train to another output.",
                setting="resume",
            )


def check_unfinished(checkpoint: str, output: Path, steps: int) -> None:
    """Refuse to go on where nothing is left to train or, of a training that was cut off at its end, to write.

    Args:
        steps: how many the training has.

    Raises:
        ReftError: all is done.
    """
    done = steps_done(checkpoint)
    losses, last = output / TABLE, Path(checkpoint) / LAST_FILE  # each is written last
    complete = is_adapter(output) and losses.is_file() and losses.stat().st_mtime >= last.stat().st_mtime
    if done >= steps and complete:
        raise ReftError(
            f"nothing is left to train: {done} steps are done, and the job has {steps}; give more `epochs`, or "
            "another `output`.",
            setting="resume",
            also=["epochs", "output"],
        )
