"""A training job from files: everything that can be checked is checked before the training starts.

The adapter's directory then holds the adapter, `checkpoints/`, and the loss as `loss.csv` and `loss.png`.
"""

import functools
import math
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..data.encode import context_length, default_format, encode, encode_all
from ..data.files import Example, Tally, read_examples
from ..data.padding import pads_rows
from ..errors import ReftError
from ..files.checkpoints import last_complete, steps_done
from ..files.record import FILE as RECORD
from ..files.record import write_record
from ..files.together import leave_out
from ..loading import load_base
from ..model import ReftModel
from ..positions import IGNORED, Positions
from ..reach import Reach
from ..reach.callbacks import ReachPrinter
from ..reach.tensors import sample
from ..tasks.suites import GENERATED, GLUE
from ..training.checkpointing import Checkpointing, CheckpointingTrainer, check_same_training, disk_full_as_os_error
from ..tuner.config import ReftConfig
from .loss_curve import PICTURE, Losses, losses_of, write_losses
from .methods import attach, count, learning_rate, make_config, save
from .output import CHECKPOINTS, check_output, check_same, check_unfinished
from .publish import check_repository, publish
from .settings import LORA, TrainingJob, check_settings

# of the training, with transformers' own way to the best checkpoint
_BEST: dict[str, Any] = {
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


class PreparedJob:
    """A job whose every part was checked: files, model, edits, tokens and directories.

    One without an output can be planned, not trained; it writes nothing.

    Attributes:
        rows, validation: the tokens to learn from and those to measure on.
        examples, validation_examples: what they were made of.
        tally: what became of the rows of the data.
        skipped: how many examples of a suite have a prompt that fills `max_length`, so that nothing is left to learn.
        shared: how many of those to measure on are learned from, too.
    """

    collator: Any
    trainer_class: type[Checkpointing] = CheckpointingTrainer
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    format: Any = None  # how prompts are written
    options: dict[str, Any] = {}  # further arguments of the training
    callbacks: Sequence[TrainerCallback] = ()

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        check_settings(job)
        self.output = Path(job.output)
        self.checkpoint = check_output(job) if job.output else None
        self.config: PeftConfig = make_config(job)
        self.skipped = self.shared = 0
        self.tally, self._held_out_tally = Tally(job.on_error), Tally(job.on_error)
        self.rows: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []
        self.validation_examples: list[Example] = []
        self._prepare()
        if job.push_to_hub and job.output:
            check_repository(job.push_to_hub)

    def _prepare(self) -> None:
        """Read the data, load the model, put the adapter on it, and encode the data."""
        job = self.job
        held_out = (
            read_examples(job.validation, replace(job.reading, limit=None), self._held_out_tally)
            if job.validation
            else []
        )
        self.examples: list[Example] = self._examples()
        set_seed(job.seed)
        model, self.tokenizer = load_base(job.model, job.dtype)
        # the paper's prompts stand as they are, whatever template a tokenizer has
        own = GENERATED[job.suite].form if job.suite else None
        self.format = own or job.format or default_format(self.tokenizer, self.examples)
        if isinstance(self.config, ReftConfig):
            self.config.prompt_format = self.format
        else:
            self.config.task_type = TaskType.CAUSAL_LM
        limit = context_length(model, self.tokenizer, job.max_length)
        self.examples, self.rows = self._encode(self.examples, limit, self.tally)
        if held_out:
            self.validation_examples, self.validation = self._encode(held_out, limit, self._held_out_tally)
        if job.best or job.early_stopping:
            self.options = _BEST
        if job.validation_split:
            self._hold_out()
        learned = set(map(_mark, self.rows)) if self.validation else set()
        self.shared = sum(_mark(row) in learned for row in self.validation)
        self.collator = pads_rows(self.tokenizer)
        self._attach(model)

    def _examples(self) -> list[Example]:
        if self.job.suite:
            return GENERATED[self.job.suite].examples(self.job.data_dir, self.job.limit)
        if self.job.data is None:
            raise ReftError("expected a file of examples, or a suite.", setting="data")
        return read_examples(self.job.data, self.job.reading, self.tally)

    def _encode(self, examples: list[Example], limit: int, tally: Tally) -> tuple[list[Example], list[dict[str, Any]]]:
        """Examples and their rows; those of a suite are cut at the limit, as the paper's are, a user's as asked."""
        if not self.job.suite:
            least = Positions.parse(self.job.positions).least if isinstance(self.config, ReftConfig) else 0
            options: dict[str, Any] = {"long_rows": self.job.long_rows, "tally": tally, "least": least}
            return encode_all(self.tokenizer, examples, self.format, limit, **options)
        rows = [encode(self.tokenizer, example, "text", sys.maxsize) for example in examples]
        cut = [{name: values[:limit] for name, values in row.items()} for row in rows]
        kept = [number for number, row in enumerate(cut) if row["labels"][-1] != IGNORED]
        self.skipped += len(cut) - len(kept)
        if examples and not kept:
            raise ReftError(
                f"every prompt has {limit} tokens or more, so nothing is left to learn.", setting="max_length"
            )
        return [examples[number] for number in kept], [cut[number] for number in kept]

    def _hold_out(self) -> None:
        """Part the rows; the answers of one chat stay together, and so do chats that are alike, if others are left."""
        texts: dict[str, Any] = {}
        for example, row in zip(self.examples, self.rows, strict=True):
            name = example.row or example.where
            texts[name] = (*texts.get(name, ()), _mark(row))
        for kept in (texts, {name: name for name in texts}):
            chats = list(dict.fromkeys(kept.values()))
            count = max(1, round(len(chats) * self.job.validation_split))
            if count < len(chats):
                break
        else:
            raise ReftError(
                f"{count} of {len(chats)} would be held out; no example is left.", setting="validation_split"
            )
        chosen = {chats[number] for number in random.Random(self.job.seed).sample(range(len(chats)), count)}
        held = [kept[example.row or example.where] in chosen for example in self.examples]
        pairs = list(zip(self.examples, self.rows, held, strict=True))
        self.validation_examples = [example for example, _, out in pairs if out]
        self.validation = [row for _, row, out in pairs if out]
        self.examples = [example for example, _, out in pairs if not out]
        self.rows = [row for _, row, out in pairs if not out]

    def _attach(self, model: Any) -> None:
        self.job = replace(self.job, lr=learning_rate(self.job, model))
        set_seed(self.job.seed)
        heads = tuple(f"{name}." for name in getattr(self.config, "modules_to_save", None) or ())
        self._base = sample(p for name, p in model.named_parameters() if not name.startswith(heads))
        self.model: Any = attach(model, self.config, self.job.model)
        self.reach: Reach | None = None
        job = self.job
        if job.reach and job.suite != GLUE and isinstance(self.model, ReftModel):
            self.reach = self._make_reach(self.model)
        if self.checkpoint:
            check_same(self.checkpoint, self.config)
            check_same_training(self.checkpoint, self.rows, job.settled, self._base)
            check_unfinished(self.checkpoint, self.output, math.ceil(self.steps()))

    def _make_reach(self, model: ReftModel) -> Reach:
        job = self.job
        return Reach(model, memory=job.reach_memory, directory=job.reach_directory if job.output else None)

    def steps(self) -> float:
        """How many steps the training has."""
        job = self.job
        return math.ceil(len(self.rows) / (job.batch_size * job.gradient_accumulation)) * job.epochs

    def train(self, progress: Callable[[int, int, float | None], None] | None = None) -> dict[str, Any]:
        """Train and save; return the figures.

        Args:
            progress: called after each step with the step, the number of steps and the loss.

        Raises:
            ReftError: the job has no output.
        """
        if not self.job.output:
            raise ReftError("expected the directory for the adapter, got none.", setting="output")
        trainer = self.trainer_class(
            model=self.model,
            processing_class=self.tokenizer,
            args=self._arguments(),
            reach=self.reach or False,
            train_dataset=self.rows,
            eval_dataset=self.validation or None,
            data_collator=self.collator,
            compute_metrics=self.compute_metrics,
            callbacks=[EarlyStoppingCallback(self.job.early_stopping)] if self.job.early_stopping else None,
        )
        trainer.settings, trainer.base = self.job.settled, self._base
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ReachPrinter)
        for callback in self.callbacks:
            trainer.add_callback(callback)
        if progress is not None:
            trainer.add_callback(_Progress(progress))
        if self.job.overwrite and not self.job.resume:
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)
        outcome = trainer.train(resume_from_checkpoint=self.checkpoint)
        self.model.eval()
        losses = losses_of(trainer.state.log_history)
        with disk_full_as_os_error():
            save(self.model, self.output, functools.partial(self._write_beside, losses))
        self.tokenizer.padding_side = "left"
        address = publish(self.output, self.job.push_to_hub) if self.job.push_to_hub else None
        return {
            "output": str(self.output),
            "examples": len(self.rows),
            "validation_examples": len(self.validation),
            "steps": trainer.state.global_step,
            "earlier_steps": steps_done(self.checkpoint) if self.checkpoint else 0,  # not in the seconds
            "seconds": outcome.metrics["train_runtime"],
            "loss": losses["loss"][-1][1] if losses["loss"] else None,
            "validation_loss": losses["validation_loss"][-1][1] if losses["validation_loss"] else None,
            "skipped": self.skipped,
            "best": trainer.state.best_metric,
            "best_step": trainer.state.best_global_step,
            "parameters": count(self.model),
            "computed": self.reach.describe() if self.reach else "Whole rows are computed in each step.",
            "address": address,
            "plot": (self.output / PICTURE).exists(),
        }

    def _write_beside(self, losses: Losses, directory: str) -> None:
        """Write what comes with the adapter."""
        if self.job.suite or self.job.method == LORA:
            write_record(directory, asdict(replace(self.job, format=self.format)))
        write_losses(directory, losses)
        leave_out(directory, RECORD, PICTURE)

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that training can go on from."""
        return last_complete(self.output / CHECKPOINTS)

    def _arguments(self) -> TrainingArguments:
        job = self.job
        steps = self.steps()
        return TrainingArguments(
            output_dir=str(self.output / CHECKPOINTS),
            num_train_epochs=job.epochs,
            learning_rate=job.lr,
            adam_beta1=float(job.adam_beta1),  # torch takes no 0
            per_device_train_batch_size=job.batch_size,
            per_device_eval_batch_size=job.batch_size,
            gradient_accumulation_steps=job.gradient_accumulation,
            warmup_steps=round(job.warmup_ratio * steps),
            # what transformers calls constant does not warm up
            lr_scheduler_type="constant_with_warmup" if job.scheduler == "constant" else job.scheduler,
            weight_decay=job.weight_decay,
            seed=job.seed,
            logging_steps=1,
            save_total_limit=2,
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=self.model.device.type == "cuda",
            report_to=job.report_to,
            **{
                "save_steps": job.save_steps or math.ceil(steps / 10),
                "eval_strategy": "epoch" if self.validation else "no",
                **self.options,
            },
        )


def _mark(row: dict[str, Any]) -> int:
    """By which a row is known from others: equal for equal tokens."""
    return hash(tuple(row["input_ids"]))


class _Progress(TrainerCallback):
    def __init__(self, tell: Callable[[int, int, float | None], None]) -> None:
        self.tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.tell(state.global_step, state.max_steps, float(logs["loss"]))
