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

import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ReftError
from ..places.structure import without_adapters
from ..tuner.edits import Edits
from ..tuner.tuner import calls_tuner, in_part, tuner_of
from .calls import COUNT, FUSED, TYPES, check_call
from .layers import LayerPlan, SkipLayers
from .loss import own_loss
from .prefixes import LabelOutput, PrefixPlan, SkipPrefixes
from .probe import Probe, Way
from .rows import IGNORED, NotExactError
from .store import Store, read_budget
from .watch import Seen, Watch

_ATTENTIONS = {"full_attention", "sliding_attention"}  # which see a token's own past, wherever its row begins


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

    Raises:
        ReftError: a directory that cannot be written, or an amount of memory that is none.
    """

    def __init__(
        self, model: Any, *, memory: int | str | None = None, directory: str | os.PathLike | None = None
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
        self.model = model
        self.store = Store(read_budget(memory), directory)
        self.why_not: str | None = None
        self._tuner = tuner
        self._edits: Edits = tuner.edits
        self._base: Any = without_adapters(model)
        self._watch = Watch(self._base, tuner.model, self._edits, prints=directory is not None)
        self._probe: Probe | None = None
        self._ways: dict[tuple, list[Way]] = {}  # by what they rest on, the one that leaves out more first
        self._way: Way | None = None  # the last one
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
        with in_part(self._tuner, lambda ordinary, call: self._forward(ordinary, call, losses)):
            yield

    def log_probs(self, **batch: Any) -> Tensor:
        """The log-probability of each label of a batch, `[batch, tokens - 1]`, zero where there is none.

        What preference losses such as DPO's are made of. Of a causal model, and with its gradients.
        """
        with in_part(self._tuner, lambda ordinary, call: self._forward(ordinary, call, True, scored=True)):
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
                way, plan = self._choose(call, ordinary, scored)
                output = way(call, plan, self.store)  # type: ignore[arg-type]  # each way has plans of its own
            except NotExactError as reason:
                self._way, self.why_not = None, str(reason)
            else:
                self.why_not = None
                # a trainer would take more for logits
                return (
                    CausalLMOutputWithPast(loss=output.loss)
                    if isinstance(output, LabelOutput) and not scored
                    else output
                )
        return ordinary(**call)

    def find_way(self, **batch: Any) -> Way | None:
        """How a batch would be computed, without computing it; none for whole rows, and `why_not` says why."""
        with self._lock, in_part(self._tuner, None):
            try:
                way, _ = self._choose(batch, self.model)
            except NotExactError as reason:
                self._way, self.why_not = None, str(reason)
                return None
            self.why_not = None
            return way

    def new_epoch(self) -> None:
        """Tell that another pass over the data begins; the base model is looked at more closely then."""
        with self._lock:
            self.store.new_epoch()
            self._watch.new_epoch()

    def describe(self) -> str:
        """One line: what is skipped, what is held, and why not if not."""
        if self._way is None:
            return f"Whole rows are computed in each step: {self.why_not}." if self.why_not else "No step yet."
        skipped = f"{self._way.kept} of {len(self._way.parts.blocks)} layers"
        if isinstance(self._way, SkipPrefixes):
            share = 1 - self._way.computed / max(self._way.tokens, 1)
            skipped = f"{100 * share:.0f} % of the tokens and {skipped}"
        store = self.store
        held = f"{len(store):,} prefixes and states in {store.held / 1e6:,.1f} of {store.budget / 1e6:,.0f} MB"
        more = f", {store.on_disk:,} more on disk" if store.on_disk else ""
        full = "; what does not fit is computed again" if store.full else ""
        return f"Each step leaves out {skipped}, held are {held}{more}{full}."

    # -- which way -------------------------------------------------------------------------------------------------

    def _choose(
        self, call: dict[str, Any], ordinary: Callable[..., Any], scored: bool = False
    ) -> tuple[Way, PrefixPlan | LayerPlan]:
        """Return the way that is exact for this call, and its plan.

        The call is checked in each step; of the base model, `Watch` says whether it has changed.

        Raises:
            NotExactError: there is none.
        """
        check_call(call)
        if self._edits.stacks != ("",):
            raise NotExactError("an encoder and a decoder have tokens of their own")
        begun = self._edits.begin({})
        if not begun.active or begun.row_adapters is not None:
            raise NotExactError("no adapter is active, or each row has its own")
        if len({len(self._edits.rules[name]) for name in begun.active}) > 1:
            raise NotExactError("the active adapters have different numbers of interventions")
        seen = self._watch.look(
            (layer._module[0], layer.side)
            for layer, names in zip(self._edits.layers, begun.enabled, strict=True)
            if names
        )
        if seen.anew or self._probe is None:
            self.store.clear()
            self._ways.clear()
            self._probe = Probe(seen.parts, self._edits)
        self._way, reason = None, self._why_prefixes(call, seen)
        for way in self._ways_for(call, seen, begun.active):
            if isinstance(way, SkipPrefixes) and reason is not None:
                continue
            if (plan := self._plan(way, call, ordinary, seen)) is not None:
                self._way = way
                return way, plan
            reason = reason or self._probe.why_not(way)
        raise NotExactError(reason or f"no layer of {type(self._base).__name__} lies below the edits")

    def _why_prefixes(self, call: dict[str, Any], seen: Seen) -> str | None:
        """Why the prefixes cannot be left out, as far as it can be told without a trial."""
        config, name = self._base.config.get_text_config(), type(self._base).__name__
        if not self._edits.causal or seen.parts.backbone is self._base:
            return f"{name} is no causal language model"
        if not set(getattr(config, "layer_types", None) or ()) <= _ATTENTIONS:
            return f"layers of {name} keep more than keys and values of attention"
        if call.get(TYPES) is not None:
            return f"the call has {TYPES}"
        return seen.reason or (None if call.get(FUSED) else own_loss(self._base))

    def _ways_for(self, call: dict[str, Any], seen: Seen, active: list[str]) -> list[Way]:
        """The ways to try, the one that leaves out more first."""
        kind = call["input_ids"].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        asked = tuple(call.get(name) is not None for name in (FUSED, TYPES, COUNT))
        state = seen.key, autocast, asked, tuple(active)
        if state not in self._ways:
            key = xxhash.xxh3_128_digest(f"{seen.key} {autocast}".encode())
            self._ways[state] = [SkipPrefixes(seen.parts, self._edits, seen.kept, key)]
            if seen.kept:
                self._ways[state] += [SkipLayers(seen.parts, seen.kept, padding, key) for padding in (False, True)]
        return self._ways[state]

    def _plan(
        self, way: Way, call: dict[str, Any], ordinary: Callable[..., Any], seen: Seen
    ) -> PrefixPlan | LayerPlan | None:
        """How a way would compute a batch; none if it would not be exact."""
        assert self._probe is not None
        plan = way.plan(call)
        if seen.limit is not None and plan.columns > seen.limit:
            raise NotExactError(f"rotary angles depend on the length of rows of more than {seen.limit} tokens")
        if not self._probe.allows(way, call, ordinary, plan.columns, seen.context):
            return None
        if isinstance(plan, PrefixPlan) and plan.joined > self._probe.proven(way):
            # two rows may take more columns together than either: more than a table of positions has, perhaps
            known = plan.joined <= max(plan.columns, seen.context)
            if not (known and self._probe.allows(way, call, ordinary, plan.joined, seen.context)):
                plan = plan.within(self._probe.proven(way))
        return plan
