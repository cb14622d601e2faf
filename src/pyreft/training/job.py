"""A training job from files: everything that can be checked is checked before the training starts.

The adapter's directory then holds the adapter, `checkpoints/`, and the loss as `loss.csv` and `loss.png`.
"""

import csv
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..base import load_base
from ..checkpoint import is_adapter
from ..config import DEFAULT_POSITIONS, ReftConfig
from ..data.encode import context_length, default_format, encode
from ..data.files import FORMATS, Example, Format, read_examples
from ..errors import ReftError, did_you_mean
from ..model import ReftModel, get_reft_model
from .trainer import ReftTrainerForCausalLM

CHECKPOINTS = "checkpoints"


@dataclass
class TrainingJob:
    """What to train, on what, and where the adapter goes.

    Args:
        data: a file of examples, see `data.files.read_examples`.
        output: the adapter's directory.
        model: the base model, see `base.load_base`.
        layers, positions, component, intervention, rank, share_weights, dropout: see `ReftConfig`.
        epochs, lr, batch_size, gradient_accumulation, warmup_ratio, weight_decay, seed: of the training.
        max_length: the most tokens of a row, the model's context if not given.
        format: how prompts are written: `text`, `chat` or `alpaca`; by default as the data and tokenizer suggest.
        validation: a second file of examples; or `validation_split`, the share of `data` to hold out.
        dtype: of the base model, see `base.load_base`.
        save_steps: how many steps lie between checkpoints; by default a tenth of the training.
        resume: go on from the last checkpoint in `output`.
        overwrite: replace the adapter that `output` holds.
    """

    data: str
    output: str
    model: str | None = None
    layers: str = "all"
    positions: str = DEFAULT_POSITIONS
    component: str = "block_output"
    intervention: str = "loreft"
    rank: int = 8
    share_weights: bool = True
    dropout: float = 0.0
    epochs: float = 10
    lr: float = 1e-3
    batch_size: int = 8
    gradient_accumulation: int = 1
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    seed: int = 42
    max_length: int | None = None
    format: Format | None = None
    validation: str | None = None
    validation_split: float = 0.0
    dtype: str = "auto"
    save_steps: int | None = None
    resume: bool = False
    overwrite: bool = False

    @classmethod
    def from_settings(cls, settings: dict[str, Any], where: str) -> "TrainingJob":
        """Make a job of named settings, such as those of a YAML file; `where` they stand is for messages."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise ReftError(f"{where}: there is no setting {name!r}.{did_you_mean(name, known)}")
        for name in ("data", "output"):
            if not settings.get(name):
                raise ReftError(f"{where}: the setting {name!r} is missing.")
        return cls(**settings)


class PreparedJob:
    """A job whose every part was checked: files, model, edits, tokens and directories."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        _check_numbers(job)
        self.output = Path(job.output)
        self.checkpoint = _check_output(job)
        examples = read_examples(job.data)
        held_out = read_examples(job.validation) if job.validation else []
        config = ReftConfig(
            layers=job.layers,
            positions=job.positions,
            component=job.component,
            intervention=job.intervention,
            low_rank_dimension=job.rank,
            share_weights=job.share_weights,
            dropout=job.dropout,
        )
        set_seed(job.seed)
        model, self.tokenizer = load_base(job.model, job.dtype)
        self.format = job.format or default_format(self.tokenizer, examples)
        config.prompt_format = self.format
        limit = context_length(model, self.tokenizer, job.max_length)
        rows = [encode(self.tokenizer, example, self.format, limit) for example in examples]
        self.validation = [encode(self.tokenizer, example, self.format, limit) for example in held_out]
        if job.validation_split:
            count = max(1, round(len(rows) * job.validation_split))
            if count >= len(rows):
                raise ReftError(f"validation_split: of {len(rows)} examples, {count} would be held out; none is left.")
            rows, self.validation = rows[count:], rows[:count]
        self.rows = rows
        self.examples: list[Example] = examples
        set_seed(job.seed)
        self.model: ReftModel = get_reft_model(model, config)

    def train(self, progress: Callable[[int, int, float | None], None] | None = None) -> dict[str, Any]:
        """Train and save; return the figures.

        Args:
            progress: called after each step with the step, the number of steps and the loss.
        """
        trainer = ReftTrainerForCausalLM(
            model=self.model,
            processing_class=self.tokenizer,
            args=self._arguments(),
            train_dataset=self.rows,
            eval_dataset=self.validation or None,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100),
        )
        trainer.remove_callback(PrinterCallback)
        if progress is not None:
            trainer.add_callback(_Progress(progress))
        if self.job.overwrite and not self.job.resume:
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        outcome = trainer.train(resume_from_checkpoint=self.checkpoint)
        self.model.eval()
        self.model.save(self.output)
        self.tokenizer.padding_side = "left"
        losses = write_losses(self.output, trainer.state.log_history)
        return {
            "output": str(self.output),
            "examples": len(self.rows),
            "validation_examples": len(self.validation),
            "steps": trainer.state.global_step,
            "seconds": outcome.metrics["train_runtime"],
            "loss": losses["loss"][-1][1] if losses["loss"] else None,
            "validation_loss": losses["validation_loss"][-1][1] if losses["validation_loss"] else None,
            "parameters": self.model.count_parameters(),
            "plot": (self.output / "loss.png").exists(),
        }

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that training can go on from."""
        directory = self.output / CHECKPOINTS
        return get_last_checkpoint(str(directory)) if directory.is_dir() else None

    def _arguments(self) -> TrainingArguments:
        job = self.job
        steps = math.ceil(len(self.rows) / (job.batch_size * job.gradient_accumulation)) * job.epochs
        return TrainingArguments(
            output_dir=str(self.output / CHECKPOINTS),
            num_train_epochs=job.epochs,
            learning_rate=job.lr,
            per_device_train_batch_size=job.batch_size,
            per_device_eval_batch_size=job.batch_size,
            gradient_accumulation_steps=job.gradient_accumulation,
            warmup_steps=round(job.warmup_ratio * steps),
            weight_decay=job.weight_decay,
            seed=job.seed,
            logging_steps=1,
            save_steps=job.save_steps or math.ceil(steps / 10),
            save_total_limit=2,
            eval_strategy="epoch" if self.validation else "no",
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=self.model.get_device().type == "cuda",
            report_to="none",
        )


class _Progress(TrainerCallback):
    def __init__(self, tell: Callable[[int, int, float | None], None]) -> None:
        self.tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.tell(state.global_step, state.max_steps, float(logs["loss"]))


def write_losses(directory: Path, history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Write the losses of a Trainer's log as `loss.csv`, and as `loss.png` where matplotlib is installed."""
    found = {
        name: [(entry["step"], float(entry[key])) for entry in history if key in entry]
        for name, key in (("loss", "loss"), ("validation_loss", "eval_loss"))
    }
    with open(directory / "loss.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *found])
        by_step = {name: dict(points) for name, points in found.items()}
        for step in sorted({step for points in found.values() for step, _ in points}):
            writer.writerow([step, *(by_step[name].get(step, "") for name in found)])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return found
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, points in found.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
    return found


def _check_numbers(job: TrainingJob) -> None:
    for name in ("epochs", "lr", "batch_size", "gradient_accumulation"):
        if not getattr(job, name) > 0:
            raise ReftError(f"{name}: expected a number above 0, got {getattr(job, name)}.")
    for name in ("dropout", "warmup_ratio", "validation_split"):
        if not 0 <= getattr(job, name) < 1:
            raise ReftError(f"{name}: expected a share from 0 to below 1, got {getattr(job, name)}.")
    if job.validation and job.validation_split:
        raise ReftError("validation: give a file or validation_split, not both.")
    if job.format is not None and job.format not in FORMATS:
        raise ReftError(
            f"format: expected {', '.join(FORMATS)}, got {job.format!r}.{did_you_mean(job.format, FORMATS)}"
        )


def _check_output(job: TrainingJob) -> str | None:
    """Check that the directory can be written and holds nothing to lose; return the checkpoint to resume from."""
    output = Path(job.output)
    checkpoints = output / CHECKPOINTS
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if job.resume:
        if last is None:
            raise ReftError(f"{output}: there is no checkpoint to resume from; leave out resume to start anew.")
    elif (is_adapter(output) or last) and not job.overwrite:
        raise ReftError(
            f"{output}: this directory already holds {'an adapter' if is_adapter(output) else 'checkpoints'}; "
            "choose another one, or pass overwrite to replace it, or resume to go on."
        )
    try:
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ReftError(f"{output}: nothing can be written there ({os.strerror(error.errno or 0)}).") from None
    return last if job.resume else None
