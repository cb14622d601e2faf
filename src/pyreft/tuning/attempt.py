"""One training of a study, on the base model, the rows and the held prefixes that all of them share; and its score.

It equals the training that `pyreft train` makes of the same settings. Which settings those are is not known here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from ..errors import ReftError
from ..files.together import leave_out
from ..jobs.held_out import answered, mean_loss, padded_batches
from ..jobs.job import PreparedJob
from ..jobs.loss_curve import PICTURE, Losses, write_table
from ..jobs.settings import TrainingJob
from ..model import ReftModel
from ..positions import IGNORED
from ..reach import Reach
from ..reach.anatomy import outside_of_edits
from ..reach.store import Store, read_budget
from ..reach.tensors import Values
from ..training.checkpointing import facts_of
from ..tuner.injection import detach

_LEAST = 8, 2  # examples to train on, and to score on
_BATCH = 32  # rows that are scored at once
_SPARE = 4  # tokens that an answer may have beyond the longest expected one


class Shared:
    """What all trainings of a study have.

    Args:
        job: without an output; the data, the seed, and the settings that nobody has tuned.

    Attributes:
        first: that job, prepared; its adapter is taken off the model.
        model: the base model.
        store: of held prefixes.

    Raises:
        ReftError: data or a model that cannot be read, or too few examples to hold some out.
    """

    def __init__(self, job: TrainingJob) -> None:
        self.first = PreparedJob(job)
        _check_enough(self.first)
        self.model = self.first.model.get_base_model()
        detach(self.model)
        self.store = Store(read_budget(job.reach_memory))

    def fingerprint(self) -> dict[str, Any]:
        """What the data and the base model are, by digests."""
        return {
            "data": facts_of(self.first.rows),
            "validation": facts_of(self.first.validation),
            "model": Values(list(outside_of_edits(self.model))).fingerprint(),
        }


def _check_enough(prepared: PreparedJob) -> None:
    rows, held_out = len(prepared.rows), len(prepared.validation)
    if rows < _LEAST[0] or held_out < _LEAST[1]:
        what = "validation" if prepared.job.validation and rows >= _LEAST[0] else "data"
        raise ReftError(
            f"expected at least {_LEAST[0]} examples to train on and {_LEAST[1]} to score on, got {rows} and "
            f"{held_out}. Give more examples, or a file of others to score on as `validation`.",
            setting=what,
            also=["validation"],
        )


class Attempt(PreparedJob):
    """A training on what is shared.

    Args:
        job: what is tried, with an output.
        shared: see there.
        watching: sees how it goes.
    """

    options = {"save_strategy": "no", "eval_strategy": "no"}

    def __init__(self, job: TrainingJob, shared: Shared, watching: "Watching") -> None:
        self._shared = shared
        self.watching, self.callbacks = watching, [watching]
        super().__init__(job)

    def _prepare(self) -> None:
        first = self._shared.first
        self.examples, self.rows, self.validation = first.examples, first.rows, first.validation
        self.format, self.collator, self.tokenizer = first.format, first.collator, first.tokenizer
        self.config.prompt_format = self.format
        self._attach(self._shared.model)

    def _make_reach(self, model: ReftModel) -> Reach:
        return Reach(model, store=self._shared.store)

    def _write_beside(self, losses: Losses, directory: str) -> None:
        write_table(directory, losses)
        leave_out(directory, PICTURE)

    def loss(self) -> float:
        """The loss of a labelled token of the held-out rows."""
        batches = padded_batches(self.tokenizer, self.validation, _BATCH)
        if self.reach is None:
            return mean_loss(self.model, batches)
        with self.reach.serving(losses=True):
            return mean_loss(self.model, batches)

    def exact(self) -> float:
        """The share of held-out answers that are exactly as expected."""
        longest = max(len(row["labels"]) - row["labels"].count(IGNORED) for row in self.validation)
        how = {"batch_size": _BATCH, "max_new_tokens": longest + _SPARE}
        pairs = list(answered(self.model, self.tokenizer, self.validation, **how))
        return sum(wanted == given for wanted, given in pairs) / len(pairs)


@dataclass
class Watching(TrainerCallback):
    """Has the held-out loss measured on the way.

    Args:
        marks: after which steps.
        tell: is called with the step and the loss.
        each: is called after each step.

    Attributes:
        seconds: what measuring took.
    """

    marks: Sequence[int]
    tell: Callable[[int, float], None]
    each: Callable[[], None]
    seconds: float = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.each()
        if state.global_step in self.marks and state.global_step < state.max_steps:
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.seconds += metrics["eval_runtime"]
        self.tell(state.global_step, metrics["eval_loss"])
