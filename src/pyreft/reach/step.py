"""A training step that computes only what an edit can reach, and equals the ordinary step.

Of a causal model the prefixes are run once, without gradients, and held as keys and values; the windows behind them
run through the blocks above the first edit, and logits are taken where there are labels. Of any other model the output
of the blocks below the first edit is held. Whether a way is exact for a model, a probe beside the ordinary step says;
where none is, the ordinary step is taken.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ReftError
from ..places.structure import without_adapters
from ..tuner.call import GIVEN
from ..tuner.edits import Edits
from ..tuner.layer import ReftLayer
from ..tuner.recompute import recomputes
from ..tuner.tuner import calls_tuner, tuner_of
from .frozen import fingerprint, longest_plain_row, outside_of_edits, state_of, sums_of, why_not_frozen
from .parts import Parts
from .probe import Probe
from .store import Store, read_budget
from .ways import BY_TOKEN, COUNT, FUSED, TYPES, Above, Behind, LabelOutput
from .window import IGNORED, NotExactError

_TAKEN = {*BY_TOKEN, *GIVEN, "labels", COUNT, FUSED}
_MORE = {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}  # asked for if true


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
        self._tuner = tuner
        self.store = Store(read_budget(memory), directory)
        self.why_not: str | None = None
        self._base: Any = without_adapters(model)
        self._edits: Edits = tuner.edits
        self._parts = Parts(self._base, self._edits)
        self._limit = longest_plain_row(self._base.config)
        self._probe = Probe(self._parts, self._edits, self._limit)
        self._spills = directory is not None
        self._base_print = ""  # a digest of the base model, by which files tell it from others
        self._modules: list[nn.Module] = []  # what the ways rest on
        self._tensors: object = None  # the state of their tensors
        self._sums = ""  # and a digest of their bits
        self._ways: dict[tuple, Behind | Above | None] = {}  # by the settings with which a probe has shown it
        self._way: Behind | Above | None = None  # the last one
        self._losses = False  # whether all calls are for their losses
        self._scored = False  # whether log-probabilities are asked for, too

    def __call__(self, **batch: Any) -> Any:
        """The model's output for a batch, or its loss alone."""
        with self.serving(losses=True):
            return self.model(**batch)

    @contextmanager
    def serving(self, *, losses: bool = False) -> Iterator[None]:
        """Let calls of the model be computed in part.

        Args:
            losses: whether all of them are for their losses. If not, those in evaluation mode may be for the logits,
                and are left as they are, unless they ask for values of the labels alone, as TRL's trainers do.
        """
        before = self._tuner.reach, self._losses
        self._tuner.reach, self._losses = self, losses
        try:
            yield
        finally:
            self._tuner.reach, self._losses = before

    def log_probs(self, **batch: Any) -> Tensor:
        """The log-probability of each label of a batch, `[batch, tokens - 1]`, zero where there is none.

        What preference losses such as DPO's are made of. Of a causal model, and with its gradients.
        """
        self._scored = True
        try:
            output = self(**batch)
        finally:
            self._scored = False
        if isinstance(output, LabelOutput):
            return output.log_probs
        logits = output.logits[:, :-1].float().transpose(1, 2)
        return -nn.functional.cross_entropy(logits, batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none")

    def forward(self, ordinary: Callable[..., Any], call: dict[str, Any]) -> Any:
        """Compute a call of the model: in part if that is exact, by `ordinary` if not."""
        if not (self._losses or self._base.training or call.get(FUSED)):
            return ordinary(**call)
        try:
            way = self._find_way(call, ordinary)
            output = way(call, ordinary, self.store)
        except NotExactError as reason:
            self.why_not = str(reason)
            return ordinary(**call)
        self.why_not = None
        if isinstance(output, LabelOutput) and not self._scored:  # a trainer would take more for logits
            return CausalLMOutputWithPast(loss=output.loss)
        return output

    def find_way(self, **batch: Any) -> Behind | Above | None:
        """How a batch would be computed, without computing it; none for whole rows, and `why_not` says why."""
        try:
            way = self._find_way(batch, self.model)
        except NotExactError as reason:
            self.why_not = str(reason)
            return None
        self.why_not = None
        return way

    def new_epoch(self) -> None:
        """Tell that another pass over the data begins; the base model is looked at more closely then."""
        self.store.new_epoch()
        if self._tensors is not None and sums_of(self._modules) != self._sums:
            self._tensors = None

    def describe(self) -> str:
        """One line: what is skipped, what is held, and why not if not."""
        if self._way is None:
            return f"Whole rows are computed in each step: {self.why_not}." if self.why_not else "No step yet."
        skipped = f"{self._way.kept} of {len(self._way.parts.blocks)} layers"
        if isinstance(self._way, Behind):
            share = 1 - self._way.computed / max(self._way.tokens, 1)
            skipped = f"{100 * share:.0f} % of the tokens and {skipped}"
        store = self.store
        held = f"{len(store):,} prefixes and states in {store.held / 1e6:,.1f} of {store.budget / 1e6:,.0f} MB"
        more = f", {store.on_disk:,} more on disk" if store.on_disk else ""
        full = "; what does not fit is computed again" if store.full else ""
        return f"Each step leaves out {skipped}, held are {held}{more}{full}."

    # -- which way -------------------------------------------------------------------------------------------------

    def _find_way(self, call: dict[str, Any], ordinary: Callable[..., Any]) -> Behind | Above:
        """Return the way that is exact for this call.

        Raises:
            NotExactError: there is none.
        """
        plain = dict.fromkeys(_MORE, False) | {"return_dict": True}
        given = {name for name, value in call.items() if value is not None and plain.get(name) is not value}
        if odd := sorted(given - _TAKEN):
            raise NotExactError(f"the call has {', '.join(odd)}")
        ids = call.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or call.get("labels") is None:
            raise NotExactError("the call has no input_ids or no labels")
        if self._edits.stacks != ("",):
            raise NotExactError("an encoder and a decoder have tokens of their own")
        if not self._active_layers() or self._edits.row_adapters is not None:
            raise NotExactError("no adapter is active, or each row has its own")
        if len({len(self._edits.rules[name]) for name in self._edits.active}) > 1:
            raise NotExactError("the active adapters have different numbers of interventions")
        if self._limit is not None and ids.shape[1] > self._limit:
            raise NotExactError(f"rotary angles depend on the length of rows of more than {self._limit} tokens")
        if recomputes(self._base):
            raise NotExactError("gradient checkpointing recomputes whole blocks; turned off, less memory is needed")
        kept = self._parts.blocks.below((layer._module[0], layer.side) for layer in self._active_layers())
        causal, modules = True, list(outside_of_edits(self._base))
        if reason := why_not_frozen(modules, self._base.config):
            causal, modules = False, self._below(kept)
            if not kept or why_not_frozen(modules, self._base.config):
                raise NotExactError(reason)
        autocast = torch.is_autocast_enabled(ids.device.type) and torch.get_autocast_dtype(ids.device.type)
        tensors, *settings = *state_of(modules), kept, autocast, self._base.config._attn_implementation
        if tensors != self._tensors:
            self.store.clear()
            self._ways.clear()
            self._modules, self._tensors, self._sums = modules, tensors, sums_of(modules)
            if self._spills:
                self._base_print = fingerprint(modules, self._base.config)
        kind = bool(call.get(FUSED)), call.get(TYPES) is not None, self._base.training
        state = *settings, causal, *kind, tuple(self._edits.active)
        self._way = None
        if state not in self._ways:
            key = xxhash.xxh3_128_digest(f"{self._base_print} {settings}".encode())
            self._ways[state] = self._probe.find(call, ordinary, kept, causal, key)
        self._way = self._ways[state]
        if self._way is None:
            raise NotExactError(self._probe.why_not)
        return self._way

    def _active_layers(self) -> list[ReftLayer]:
        return [layer for layer in self._edits.layers if layer.enabled_adapters]

    def _below(self, kept: int) -> list[nn.Module]:
        """What the output of the first blocks may depend on; what else there is may be trained."""
        above = self._parts.blocks.modules_from(kept)
        return [module for module in outside_of_edits(self._parts.backbone) if module not in above]
