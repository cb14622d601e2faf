"""A training job from files: everything that can be checked is checked before the training starts.

The adapter's directory then holds the adapter, `checkpoints/`, and the loss as `loss.csv` and `loss.png`.
"""

import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..base import check_language_model, load_base
from ..checkpoint import is_adapter, read_config
from ..config import ReftConfig
from ..data.encode import context_length, default_format, encode
from ..data.files import Example, read_examples
from ..errors import ReftError
from ..model import ReftModel, get_reft_model
from ..reach import Reach
from .checkpoints import CheckpointingTrainer, disk_full_as_os_error, last_complete
from .losses import write_losses
from .settings import TrainingJob, check_numbers
from .trainer import ReachPrinter

CHECKPOINTS = "checkpoints"
# what a checkpoint and the job that goes on from it have in common
_SAME = (
    *("layers", "positions", "component", "intervention", "low_rank_dimension", "share_weights"),
    *("prompt_format", "base_model_shape"),
)


class PreparedJob:
    """A job whose every part was checked: files, model, edits, tokens and directories.

    One without an output can be planned, not trained; it writes nothing.
    """

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        check_numbers(job)
        self.output = Path(job.output)
        self.checkpoint = _check_output(job) if job.output else None
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
        check_language_model(job.model)
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
            chosen = set(random.Random(job.seed).sample(range(len(rows)), count))
            self.validation = [rows[number] for number in sorted(chosen)]
            rows = [row for number, row in enumerate(rows) if number not in chosen]
        self.rows = rows
        self.examples: list[Example] = examples
        if job.model and os.path.isdir(job.model):
            config.base_model_name_or_path = os.path.abspath(job.model)  # to be found from any directory
        set_seed(job.seed)
        self.model: ReftModel = get_reft_model(model, config)
        self.reach: Reach | None = None
        if job.reach:
            self.reach = Reach(
                self.model, memory=job.reach_memory, directory=job.reach_directory if job.output else None
            )
        if self.checkpoint:
            _check_same(read_config(self.checkpoint), config, self.checkpoint)

    def train(self, progress: Callable[[int, int, float | None], None] | None = None) -> dict[str, Any]:
        """Train and save; return the figures.

        Args:
            progress: called after each step with the step, the number of steps and the loss.

        Raises:
            ReftError: the job has no output.
        """
        if not self.job.output:
            raise ReftError("output: expected the directory for the adapter, got none.")
        trainer = CheckpointingTrainer(
            model=self.model,
            processing_class=self.tokenizer,
            args=self._arguments(),
            reach=self.reach or False,
            train_dataset=self.rows,
            eval_dataset=self.validation or None,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ReachPrinter)
        if progress is not None:
            trainer.add_callback(_Progress(progress))
        if self.job.overwrite and not self.job.resume:
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        outcome = trainer.train(resume_from_checkpoint=self.checkpoint)
        self.model.eval()
        with disk_full_as_os_error():
            self.model.save(self.output)
            losses = write_losses(self.output, trainer.state.log_history)
        self.tokenizer.padding_side = "left"
        return {
            "output": str(self.output),
            "examples": len(self.rows),
            "validation_examples": len(self.validation),
            "steps": trainer.state.global_step,
            "seconds": outcome.metrics["train_runtime"],
            "loss": losses["loss"][-1][1] if losses["loss"] else None,
            "validation_loss": losses["validation_loss"][-1][1] if losses["validation_loss"] else None,
            "parameters": self.model.count_parameters(),
            "computed": self.reach.describe() if self.reach else "Whole rows are computed in each step.",
            "plot": (self.output / "loss.png").exists(),
        }

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that training can go on from."""
        return last_complete(self.output / CHECKPOINTS)

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


def _check_same(before: ReftConfig, now: ReftConfig, checkpoint: str) -> None:
    for name in _SAME:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ReftError(
                f"resume: {checkpoint} was made with {name} = {old!r}, now it is {new!r}; resume with the same "
                "settings, or train to another output."
            )


def _check_output(job: TrainingJob) -> str | None:
    """Check that the directory can be written and holds nothing to lose; return the checkpoint to resume from."""
    output = Path(job.output)
    last = last_complete(output / CHECKPOINTS)
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
