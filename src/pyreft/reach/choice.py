"""Which way to compute a call in part is exact, if any is.

The call is checked in each step, and the model where `Watch` saw it change; ways are tried by a `Probe`.
"""

from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import nn

from ..tuner.registry import Edits
from .arguments import COUNT, FUSED, TYPES, check_call
from .layers import LayerPlan, SkipLayers
from .loss import own_loss
from .prefixes import PrefixPlan, SkipPrefixes
from .probe import Probe, Way
from .rows import NotExactError
from .store import Store
from .watch import Seen, Watch

_ATTENTIONS = {"full_attention", "sliding_attention"}  # which see a token's own past, wherever its row begins


class Choice:
    """Chooses ways for the calls of a model.

    Args:
        base: the model.
        outer: it, or what another kind of adapter has put around it.
        edits: of the model.
        store: what the ways hold; emptied when the model is another.
        prints: whether the store serves later runs or other adapters, too, so that its keys name the base model.

    Attributes:
        last: the way that was chosen last; none if none was.
        whole_rows: why it leaves out layers alone, where a causal model might leave out prefixes, too.
    """

    def __init__(self, base: Any, outer: nn.Module, edits: Edits, store: Store, prints: bool) -> None:
        self.last: Way | None = None
        self.whole_rows: str | None = None
        self._base, self._edits, self._store, self._prints = base, edits, store, prints
        self._watch = Watch(base, outer, edits, prints)
        self._probe: Probe | None = None
        self._ways: dict[tuple, list[Way]] = {}  # by what they rest on, the one that leaves out more first

    def new_epoch(self) -> None:
        """Tell that the model is to be looked at more closely."""
        self._watch.new_epoch()

    def choose(self, call: dict[str, Any], ordinary: Callable[..., Any]) -> tuple[Way, PrefixPlan | LayerPlan]:
        """Return the way that is exact for a call, and its plan.

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
            if not self._prints:
                self._store.clear()
            self._ways.clear()
            self._probe = Probe(seen.parts, self._edits)
        self.last, reason = None, self._why_prefixes(call, seen)
        for way in self._ways_for(call, seen, begun.active):
            if isinstance(way, SkipPrefixes) and reason is not None:
                continue
            if (plan := self._plan(way, call, ordinary, seen)) is not None:
                self.last, self.whole_rows = way, reason if isinstance(way, SkipLayers) and self._edits.causal else None
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
