"""What a training job may be told, with the defaults, and the checks that need no file and no model."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..data.fields import Format, Turns
from ..data.files import Reading
from ..data.tally import LongRows, OnError
from ..errors import ReftError, did_you_mean
from ..interventions import intervention_class, short_name
from ..tasks.suites import GLUE, check_suite
from ..tuner.config import DEFAULT_POSITIONS
from ..tuner.representation import default_dropout, default_intervention
from .limits import METHODS, check_values

LORA = "lora"
REFT_ALONE = ("layers", "positions", "component", "intervention", "share_weights")
_SETTLED = "lr", "batch_size", "gradient_accumulation", "warmup_ratio", "adam_beta1", "weight_decay", "seed", "dtype"
# what `generate` may be told: whole numbers with the least that can be, and numbers above 0
_COUNTS = {"max_new_tokens": 1, "max_length": 1, "num_beams": 1, "top_k": 0, "no_repeat_ngram_size": 0}
_DECODING = (*_COUNTS, "temperature", "top_p", "repetition_penalty")


@dataclass
class TrainingJob:
    """What to train, on what, and where the adapter goes.

    Args:
        output: the adapter's directory; none for a job that is planned, not trained.
        data: a file of examples, see `data.files.read_examples`; or a `suite` of the paper instead, see
            `jobs.recipes.recipe_jobs`.
        suite, task, data_dir: the suite, its task if it is GLUE, and the directory of its data; the hub if not given.
        turns, prompt_field, completion_field, encoding, on_error: how `data` is read, see `data.files.Reading`.
        limit: train on the first so many examples.
        decoding: how an evaluation on the suite generates answers, if not as its shipped recipe; see `check_decoding`.
        model: the base model, see `loading.load_base`.
        method: `loreft`, `direft` (of the paper: the formula `nodireft`) or `lora`, PEFT's at every token; else as
            `intervention` says.
        layers, positions, component, intervention, rank, share_weights, dropout: see `ReftConfig`; `rank`, 8 if not
            given, and `dropout` are the method lora's, too. A rank alone stays with the formula `lora`, while in
            `ReftConfig` it is the original's LoReFT.
        alpha: the scale of the method `lora`, 16 if not given, or of the formula `lora`, twice the rank if not given.
        target_modules: the modules that the method `lora` adapts, as `q_proj;v_proj`; by default as PEFT knows the
            model.
        epochs, lr, batch_size, gradient_accumulation, warmup_ratio, weight_decay, seed: of the training; for the
            learning rate, if it is not given, see `jobs.methods.learning_rate`.
        lr_scheduler_type: whether the rate, once it is warm, stays, `constant`, or falls to 0, `linear` or `cosine`;
            by default it stays for the formula `lora`, which learns more so (`benchmarks/schedules.py`), and falls in a
            line for others.
        adam_beta1: Adam's momentum; with less, such as 0.5, and a higher rate, a small model may learn in fewer
            steps (`benchmarks/curves.py`).
        max_length: the most tokens of a row, the model's context if not given.
        long_rows: what becomes of rows with more: `refuse`, `cut` their prompts from the left, or `skip` them.
        format: how prompts are written: `text`, `chat` or `alpaca`; by default as the data and tokenizer suggest.
        validation: a second file of examples; or `validation_split`, the share of `data` to hold out.
        dtype: of the base model, see `loading.load_base`.
        reach: compute only what the edits can reach, see `pyreft.reach.Reach`.
        reach_memory, reach_directory: how much of the rest may be held, and where the remainder goes; see there.
        best: keep the adapter of the epoch with the lowest validation loss, not the last one.
        early_stopping: end the training after so many epochs in a row without a lower validation loss; includes `best`.
        push_to_hub: a repository of the hub, as `owner/name`, to which the adapter is uploaded; made, private, if it is
            not there.
        save_steps: how many steps lie between checkpoints; by default a tenth of the training.
        report_to: a logger that `Trainer` knows and that is installed, such as `tensorboard`, `trackio` or `wandb`.
        resume: go on from the last checkpoint in `output`.
        overwrite: replace the adapter that `output` holds.
    """

    output: str = ""
    data: str | None = None
    suite: str | None = None
    task: str | None = None
    data_dir: str | None = None
    turns: Turns = "each"
    prompt_field: str | None = None
    completion_field: str | None = None
    encoding: str | None = None
    on_error: OnError = "stop"
    limit: int | None = None
    decoding: dict[str, Any] | None = None
    model: str | None = None
    method: str | None = None
    layers: str = "all"
    positions: str = DEFAULT_POSITIONS
    component: str | None = None
    intervention: str | None = None
    rank: int | None = None
    share_weights: bool = True
    dropout: float | None = None
    alpha: float | None = None
    target_modules: str | None = None
    epochs: float = 10
    lr: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    warmup_ratio: float = 0.0
    lr_scheduler_type: str | None = None
    adam_beta1: float = 0.9
    weight_decay: float = 0.0
    seed: int = 42
    max_length: int | None = None
    long_rows: LongRows = "refuse"
    format: Format | None = None
    validation: str | None = None
    validation_split: float = 0.0
    best: bool = False
    early_stopping: int | None = None
    dtype: str = "auto"
    reach: bool = True
    reach_memory: str | None = None
    reach_directory: str | None = None
    save_steps: int | None = None
    push_to_hub: str | None = None
    report_to: str = "none"
    resume: bool = False
    overwrite: bool = False

    @property
    def formula(self) -> str | None:
        """The formula of the edits; none if the method is LoRA at every token."""
        if self.method:
            return METHODS[self.method]
        return short_name(intervention_class(self.intervention or default_intervention(self.component)))

    @property
    def edit_dropout(self) -> float:
        """The dropout on the edits, or in PEFT's LoRA."""
        named = self.method, self.intervention, self.component
        return default_dropout(*named) if self.dropout is None else self.dropout

    @property
    def reading(self) -> Reading:
        """How `data` is read.

        Raises:
            ReftError: a setting of it that cannot be.
        """
        return Reading(**{f.name: getattr(self, f.name) for f in fields(Reading)})

    @property
    def scheduler(self) -> str:
        """How the learning rate goes on once it is warm."""
        return self.lr_scheduler_type or ("constant" if self.formula == "lora" else "linear")

    @property
    def settled(self) -> dict[str, Any]:
        """The settings that a training cannot change on its way; that it has more epochs than at first, it can."""
        known = {name: getattr(self, name) for name in _SETTLED}
        return known | {"dropout": self.edit_dropout, "lr_scheduler_type": self.scheduler}

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], where: str, needed: tuple[str, ...] = ("data", "output")
    ) -> "TrainingJob":
        """Make a job of named settings, such as those of a YAML file; `where` they stand is for messages."""
        known = {f.name: f.type for f in fields(cls)}
        for name in settings:
            if name not in known:
                hint = did_you_mean(name, known) or " `pyreft train --help` lists them."
                raise ReftError(f"there is no setting {name!r}.{hint}", where=where)
        for name in needed:
            if name == "data" and settings.get("suite"):
                continue
            if not settings.get(name):
                raise ReftError(f"the setting {name!r} is missing.", where=where, also=[name])
        for name in REFT_ALONE if settings.get("method") == LORA else ():  # also where it is what edits have by default
            if (value := settings.get(name)) is not None:
                raise ReftError(f"LoRA has no such setting, got {value!r}; leave it out.", setting=name)
        return cls(**{name: _read(name, value, known[name], where) for name, value in settings.items()})


def check_decoding(values: Any, where: str) -> dict[str, Any]:
    """Return the setting `decoding`, arguments of `generate`, as their types ask for.

    Args:
        values: by name.
        where: the setting stands, for messages.

    Raises:
        ReftError: one that is not known here, or a value that it cannot have.
    """
    if not isinstance(values, dict):
        raise ReftError(f"expected 'name: value' lines, got {values!r}.", setting="decoding", where=where)
    where, read = f"{where}: decoding", {}
    for name, value in values.items():
        if name not in _DECODING:
            raise ReftError(f"there is no key {name!r}.{did_you_mean(name, _DECODING)}", where=where)
        read[name] = number = _read(name, value, int if name in _COUNTS else float, where)
        if name in _COUNTS:
            fits, expected = number >= _COUNTS[name], f"{_COUNTS[name]} or more"
        elif name == "top_p":
            fits, expected = 0 < number <= 1, "a number above 0, at most 1"
        else:
            fits, expected = number > 0, "a number above 0"
        if not fits:
            raise ReftError(f"expected {expected}, got {value!r}.", setting=name, where=where)
    return read


def check_settings(job: TrainingJob) -> None:
    """Refuse numbers that no training can have, and settings that contradict each other."""
    check_values(vars(job))
    for name in ("task", "data_dir", "decoding"):
        if job.suite is None and getattr(job, name) is not None:
            raise ReftError(
                "it is for a suite of the paper; name its recipe, as `pyreft train commonsense`.", setting=name
            )
    read = job.reading  # checked where it is made
    if job.suite is not None:
        check_suite(job.suite, "train")
        if replace(read, limit=None) != Reading() or job.long_rows != "refuse":
            raise ReftError(f"the suite {job.suite} has its own data, which is read in its own way.", setting="suite")
        for name in ("data", "format", *(() if job.suite == GLUE else ("task",))):
            if getattr(job, name) is not None:
                raise ReftError(
                    f"the suite {job.suite} decides it; leave it out, or `suite`.", setting=name, also=["suite"]
                )
    if job.suite == GLUE and job.push_to_hub:
        raise ReftError("each task has an adapter of its own; upload them once they are made.", setting="push_to_hub")
    if job.suite == GLUE and job.decoding:
        raise ReftError("the tasks of GLUE generate nothing; leave it out.", setting="decoding")
    check_logger(job.report_to)
    _check_validated(job)
    _check_whole(job)
    if job.resume and job.overwrite:
        raise ReftError("give one of `resume`, which goes on with what is there, and `overwrite`.",
                        setting="overwrite", also=["resume", "overwrite"])  # fmt: skip
    if job.validation and job.validation_split:
        raise ReftError("give a file or `validation_split`, not both.", setting="validation", also=["validation_split"])


def _check_whole(job: TrainingJob) -> None:
    """Refuse to say where the rest of a step is held, where there is none."""
    for name in ("reach_memory", "reach_directory"):
        if getattr(job, name) is not None and (not job.reach or job.method == LORA or job.suite == GLUE):
            raise ReftError("nothing is held where each step computes whole rows; leave it out.", setting=name)


def _check_validated(job: TrainingJob) -> None:
    """Refuse to look for the best adapter of a job without a validation, or between checkpoints of its own."""
    for name in ("best", "early_stopping"):
        if getattr(job, name) and not (job.validation or job.validation_split or job.suite == GLUE):
            raise ReftError(
                "the best adapter has the lowest validation loss; give `validation` or `validation_split`.",
                setting=name,
                also=["validation", "validation_split"],
            )
        if getattr(job, name) and job.save_steps:
            raise ReftError(
                f"with `{name}` there is a checkpoint after each epoch; leave it out.",
                setting="save_steps",
                also=[name],
            )


def check_logger(name: str) -> None:
    """Refuse a logger that `Trainer` does not know, or that is not installed."""
    if name == "none":
        return
    if name not in INTEGRATION_TO_CALLBACK:
        known = ("none", *INTEGRATION_TO_CALLBACK)
        raise ReftError(f"expected {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}", setting="report_to")
    if name not in get_available_reporting_integrations():
        raise ReftError(f"{name} is not installed; `pip install {name}`, or leave it out.", setting="report_to")


def _read(name: str, value: Any, kind: Any, where: str) -> Any:
    """A setting's value as its type asks for; YAML reads `1e-3` as text."""
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in kinds:
        return None
    if name in ("layers", "target_modules"):
        return ";".join(map(str, value)) if isinstance(value, list) else str(value)
    if name == "component" and isinstance(value, list):
        return ",".join(map(str, value))
    if name == "decoding":
        return check_decoding(value, where)
    if bool in kinds:
        if isinstance(value, bool):
            return value
        raise ReftError(f"expected true or false, got {value!r}.", setting=name, where=where)
    if not {int, float} & set(kinds):
        if value is None or isinstance(value, (bool, float, list, dict, set)):
            quotes = " Put it in quotes." if isinstance(value, float) else ""  # it may have been 1.10
            raise ReftError(f"expected text, got {value!r}.{quotes}", setting=name, where=where)
        return str(value)
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number) or (int in kinds and number != int(number)):
            raise ValueError
    except (TypeError, ValueError):
        expected = "a whole number" if int in kinds else "a number"
        raise ReftError(f"expected {expected}, got {value!r}.", setting=name, where=where) from None
    return int(number) if int in kinds else number
