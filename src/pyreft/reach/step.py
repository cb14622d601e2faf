"""A training step that computes only what an edit can reach, and equals the ordinary step.

Of a causal model the prefixes are run once, without gradients, and held as keys and values; the windows behind them
run through the blocks above the first edit, and logits are taken where there are labels. Of any other model the output
of the blocks below the first edit is held. Whether a way is exact for a model, a probe beside the ordinary step says;
where none is, the ordinary step is taken.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ReftError
from ..places.structure import without_adapters
from ..positions import IGNORED
from ..tuner.in_part import in_part
from ..tuner.registry import Edits
from ..tuner.tuner import calls_tuner, tuner_of
from .arguments import FUSED
from .choice import Choice
from .prefixes import LabelOutput, SkipPrefixes
from .probe import Way
from .rows import NotExactError
from .store import Store, read_budget


class Reach:
    """Steps of a model that compute only what its edits can reach.

    `ReftTrainer` uses one by itself. In a loop of one's own, call it instead of the model:

        reach = Reach(reft_model)
        loss = reach(**batch).loss

    The loss equals the model's, and so do the gradients of the edits; of a causal model, the output has nothing else.
    Where that would not be exact, the model is called as it is, and `why_not` says why. For trainers of other libraries
    there is `ReachCallback`.

    Args:
        model: a PEFT model with edits, the rest of it frozen.
        memory: how much may be held of prefixes and states, in bytes or as `"4GB"`; half of the free memory if not
            given. What does not fit is computed again in each step.
        directory: where to put what does not fit into memory. It stays there for later runs.
        store: that of another `Reach`, whose adapter was on the same base model before: what it holds is not computed
            again. It was made with a store, too; `memory` and `directory` are the store's.

    Raises:
        ReftError: a directory that cannot be written, or an amount of memory that is none.
    """

    def __init__(
        self,
        model: Any,
        *,
        memory: int | str | None = None,
        directory: str | os.PathLike | None = None,
        store: Store | None = None,
    ) -> None:
        tuner = tuner_of(model)
        if tuner is None:
            raise ReftError(
                "reach: expected a model with representation edits, as get_reft_model or peft.get_peft_model returns "
                f"it, got {type(model).__name__}."
            )
        if not calls_tuner(model):
            raise ReftError(
                "reach: expected a ReftModel, or a PEFT model for a task. Give task_type='CAUSAL_LM' to the ReftConfig."
            )
        self.model, self.memory, self.directory, self._shared = model, memory, directory, store
        self.store = Store(read_budget(memory), directory) if store is None else store
        self.why_not: str | None = None
        self._tuner = tuner
        self._edits: Edits = tuner.edits
        self._base: Any = without_adapters(model)
        prints = directory is not None or store is not None
        self._choice = Choice(self._base, tuner.model, self._edits, self.store, prints)
        self._lock = threading.RLock()

    def __call__(self, **batch: Any) -> Any:
        """The model's output for a batch, or its loss alone."""
        with self.serving(losses=True):
            return self.model(**batch)

    @contextmanager
    def serving(self, *, losses: bool = False) -> Iterator[None]:
        """Let calls of the model that this thread makes be computed in part.

        Args:
            losses: whether all of them are for their losses. If not, those in evaluation mode may be for the logits,
                and are left as they are, unless they ask for values of the labels alone, as TRL's trainers do.
        """
        with in_part.by(self._tuner, lambda ordinary, call: self._forward(ordinary, call, losses)):
            yield

    def anew(self, model: Any) -> "Reach":
        """Another one with the same settings for a model that takes the place of this one's."""
        return Reach(model, memory=self.memory, directory=self.directory, store=self._shared)

    def log_probs(self, **batch: Any) -> Tensor:
        """The log-probability of each label of a batch, `[batch, tokens - 1]`, zero where there is none.

        What preference losses such as DPO's are made of. Of a causal model, and with its gradients.
        """
        with in_part.by(self._tuner, lambda ordinary, call: self._forward(ordinary, call, True, scored=True)):
            output = self.model(**batch)
        if isinstance(output, LabelOutput):
            return output.log_probs
        logits = output.logits[:, :-1].float().transpose(1, 2)
        return -nn.functional.cross_entropy(logits, batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none")

    def _forward(self, ordinary: Callable[..., Any], call: dict[str, Any], losses: bool, scored: bool = False) -> Any:
        """Compute a call of the model: in part if that is exact, by `ordinary` if not.

        Args:
            losses: see `serving`.
            scored: whether the log-probabilities of the labels are asked for, not the loss.
        """
        if not (losses or self._base.training or call.get(FUSED)):
            return ordinary(**call)
        with self._lock:
            try:
                way, plan = self._choice.choose(call, ordinary)
                output = way(call, plan, self.store)  # type: ignore[arg-type]  # each way has plans of its own
            except NotExactError as reason:
                self.why_not = str(reason)
            else:
                self.why_not = None
                if isinstance(way, SkipPrefixes):
                    self._edits.steps.watch(output)  # as after a forward of the model
                if isinstance(output, LabelOutput) and not scored:  # a trainer would take more for logits
                    return CausalLMOutputWithPast(loss=output.loss)
                return output
        return ordinary(**call)

    def find_way(self, **batch: Any) -> Way | None:
        """How a batch would be computed, without computing it; none for whole rows, and `why_not` says why."""
        with self._lock, in_part.by(self._tuner, None):
            try:
                way, _ = self._choice.choose(batch, self.model)
            except NotExactError as reason:
                self.why_not = str(reason)
                return None
            self.why_not = None
            return way

    def new_epoch(self) -> None:
        """Tell that another pass over the data begins; the base model is looked at more closely then."""
        with self._lock:
            self.store.new_epoch()
            self._choice.new_epoch()

    @property
    def _way(self) -> Way | None:
        """The last one."""
        return self._choice.last

    def describe(self) -> str:
        """One line: what is skipped, what is held, and why not if not."""
        if self._way is None:
            return f"Whole rows are computed in each step: {self.why_not}." if self.why_not else "No step yet."
        skipped = f"{self._way.kept} of {len(self._way.parts.blocks)} layers"
        if isinstance(self._way, SkipPrefixes):
            share = 1 - self._way.computed / max(self._way.tokens, 1)
            skipped = f"{100 * share:.0f} % of the tokens and {skipped}"
        elif self._choice.whole_rows:
            skipped += f" and no tokens ({self._choice.whole_rows})"
        store = self.store
        held = f"{len(store):,} prefixes and states in {store.held / 1e6:,.1f} of {store.budget / 1e6:,.0f} MB"
        more = f", {store.on_disk:,} more on disk" if store.on_disk else ""
        full = "; what does not fit is computed again" if store.full else ""
        return f"Each step leaves out {skipped}, held are {held}{more}{full}."
