"""A training step that computes only what an edit can reach, and equals the ordinary step.

Of a causal model the prefixes are run once, without gradients, and held as keys and values; the windows behind them
run through the blocks above the first edit, and logits are taken where there are labels. Of any other model the output
of the blocks below the first edit is held. Whether a way is exact for a model, a probe beside the ordinary step says;
where none is, the ordinary step is taken.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ReftError
from ..layer import ReftLayer
from ..locator import GIVEN, LOCATIONS, Locator
from ..structure import without_adapters
from ..tuner import tuner_of
from .frozen import fingerprint, longest_plain_row, outside_of_edits, state_of, sums_of, why_not_frozen
from .parts import Parts
from .store import Store, read_budget
from .ways import BY_TOKEN, COUNT, FUSED, TYPES, Above, Behind, LabelOutput
from .window import IGNORED, NotExactError, Rows

_TAKEN = {*BY_TOKEN, *GIVEN, "labels", COUNT, FUSED}
_MORE = {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}  # asked for if true
_ATTENTIONS = {"full_attention", "sliding_attention"}  # which see a token's own past, wherever its row begins
_PROBED = 6  # tokens before and after the beginning of a window
_SHIFT = 64  # columns of padding before them
_UNLIKE = (
    NotExactError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        if type(model).forward is PeftModel.forward:
            raise ReftError(
                "reach: expected a ReftModel, or a PEFT model for a task. Give task_type='CAUSAL_LM' to the ReftConfig."
            )
        self.model = model
        self._tuner = tuner
        self.store = Store(read_budget(memory), directory)
        self.why_not: str | None = None
        self._base: Any = without_adapters(model)
        self._locator: Locator = tuner._locator
        self._parts = Parts(self._base, self._locator)
        self._limit = longest_plain_row(self._base.config)
        self._spills = directory is not None
        self._base_print = ""  # a digest of the base model, by which files tell it from others
        self._modules: list[nn.Module] = []  # what the ways rest on
        self._tensors: object = None  # the state of their tensors
        self._sums = ""  # and a digest of their bits
        self._ways: dict[tuple, Behind | Above | None] = {}  # by the settings with which a probe has shown it
        self._way: Behind | Above | None = None  # the last one
        self._losses = False  # whether all calls are for their losses
        self._scored = False  # whether log-probabilities are asked for, too
        self._no_way = f"parts of {type(self._base).__name__} computed apart differ from the whole"

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
        if list(self._locator.streams) != [""]:
            raise NotExactError("an encoder and a decoder have tokens of their own")
        if not self._active_layers() or self._locator.row_adapters is not None:
            raise NotExactError("no adapter is active, or each row has its own")
        if len({len(self._locator.rules[name]) for name in self._locator.active}) > 1:
            raise NotExactError("the active adapters have different numbers of interventions")
        if self._limit is not None and ids.shape[1] > self._limit:
            raise NotExactError(f"rotary angles depend on the length of rows of more than {self._limit} tokens")
        if self._locator.recomputes():
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
        state = *settings, causal, *kind, tuple(self._locator.active)
        self._way = None
        if state not in self._ways:
            key = xxhash.xxh3_128_digest(f"{self._base_print} {settings}".encode())
            self._ways[state] = self._probe(call, ordinary, kept, causal, key)
        self._way = self._ways[state]
        if self._way is None:
            raise NotExactError(self._no_way)
        return self._way

    def _active_layers(self) -> list[ReftLayer]:
        return [layer for layer in self._locator.layers if layer.enabled_adapters]

    def _below(self, kept: int) -> list[nn.Module]:
        """What the output of the first blocks may depend on; what else there is may be trained."""
        above = self._parts.blocks.modules_from(kept)
        return [module for module in outside_of_edits(self._parts.backbone) if module not in above]

    # -- probes ----------------------------------------------------------------------------------------------------

    def _probe(
        self, call: dict[str, Any], ordinary: Callable[..., Any], kept: int, causal: bool, key: bytes
    ) -> Behind | Above | None:
        """Try the ways on a few tokens of this batch beside the ordinary step, without randomness.

        A base model in float32 is tried in float32, even if it is trained in mixed precision.

        Raises:
            NotExactError: a batch that tells nothing of the model.
        """
        parts, kind = self._parts, call["input_ids"].device.type
        config = self._base.config.get_text_config()
        causal = causal and self._locator.causal and parts.backbone is not self._base and call.get(TYPES) is None
        causal = causal and set(getattr(config, "layer_types", None) or ()) <= _ATTENTIONS
        mixed = torch.is_autocast_enabled(kind) and self._base.dtype != torch.float32
        devices = [call["input_ids"].device] if kind == "cuda" else []
        with (
            torch.no_grad(),
            _without_dropout(self._active_layers()),
            torch.autocast(kind, enabled=mixed),
            torch.random.fork_rng(devices),  # the training draws as if nothing had been tried
        ):
            if causal and (way := self._probe_behind(call, ordinary, kept, key)) is not None:
                return way
            for padding in (False, True) if kept else ():
                above = Above(parts, self._locator, kept, padding, key)
                if self._is_exact_above(above, call, ordinary):
                    return above
        return None

    def _probe_behind(self, call: dict[str, Any], ordinary: Callable[..., Any], kept: int, key: bytes) -> Behind | None:
        """The way that counts positions as the model does, if it is exact.

        Where a row's padding changes them only in a rounding, as with rotary positions, they are counted without it:
        then what is held serves the row in any batch.
        """
        ways = [Behind(self._parts, self._locator, kept, offsets, key) for offsets in (False, True)]
        far, near = self._few(call, *ways[0].cut_at(call))
        try:
            expected = [ordinary(**each) for each in (far, near)]
            plain, offset = (
                max(_distance_behind(way, *pair) for pair in zip((far, near), expected, strict=True)) for way in ways
            )
            way = ways[plain > max(4 * offset, 2 * torch.finfo(self._base.dtype).eps, 1e-4)]
            if call.get(FUSED):
                near, expected[1] = near | {FUSED: True}, ordinary(**near, **{FUSED: True})
            output = way(near, ordinary, Store(0))  # a model may have a loss of its own
            distance = max(min(plain, offset), _distance(output, expected[1], ("loss",)))
        except _UNLIKE as error:
            self._no_way = str(error)  # a model that cannot be run in parts at all
            return None
        way.tokens = way.computed = 0
        return way if distance <= self._tolerance() else None

    def _few(self, call: dict[str, Any], edited: Tensor, rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
        """A few tokens on either side of the beginning of a window, behind much padding, and before a little."""
        number = rows.prefix_lengths.index(rows.past)
        first = max(rows.first[number], rows.start[number] - _PROBED)
        last = max(rows.start[number] + _PROBED, first + 3)
        ids, where = call["input_ids"][number, first:last], edited[number, first:last]
        count = max(len(self._locator.rules[name]) for name in self._locator.active)
        width = self._limit or getattr(self._base.config.get_text_config(), "max_position_embeddings", None)
        room = min(_SHIFT, max(0, (width or _SHIFT + len(ids)) - len(ids)))
        return _padded_left(ids, where, count, room), _padded_right(ids, where, count)

    def _is_exact_above(self, way: Above, call: dict[str, Any], ordinary: Callable[..., Any]) -> bool:
        """Compare what the model returns for a few rows, padded on either side."""
        few = _two_padded(call)
        store = Store(1 << 62)
        expected = ordinary(**few)
        found = [way(few, ordinary, store) for _ in range(2)]  # computed, then held
        return all(_distance(one, expected, ("logits",)) <= self._tolerance() for one in found)

    def _tolerance(self) -> float:
        """What rounding may make of a tensor, relative to it; structural differences are far larger."""
        return max(8 * torch.finfo(self._base.dtype).eps, 1e-4)


def _padded_left(ids: Tensor, where: Tensor, count: int, room: int) -> dict[str, Any]:
    """A batch of a row and its end, behind padding, edited at these tokens."""
    text = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    text[1, : _gap(ids)] = False
    pad = (room, 0)
    batch, edited = (nn.functional.pad(each.repeat(2, 1), pad) for each in (ids, where))
    return _labelled(batch, edited, nn.functional.pad(text, pad), count)


def _padded_right(ids: Tensor, where: Tensor, count: int) -> dict[str, Any]:
    """A batch of a row and its end, before padding."""
    text = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    text[1, len(ids) - _gap(ids) :] = False
    batch, edited = (torch.stack((each, each.roll(-_gap(ids)))) for each in (ids, where))
    return _labelled(batch, edited, text, count)


def _gap(ids: Tensor) -> int:
    return min(2, len(ids) - 2)


def _labelled(ids: Tensor, edited: Tensor, text: Tensor, count: int) -> dict[str, Any]:
    edited = edited & text
    columns = torch.arange(ids.shape[1], device=ids.device)
    locations = columns.where(edited, -1)[:, None].expand(-1, count, -1)
    begin = columns.where(edited, ids.shape[1] - 2).amin(1, keepdim=True)
    labels = ids.where(text & (columns > begin), IGNORED)
    return {"input_ids": ids, "attention_mask": text.long(), "labels": labels, LOCATIONS: locations}


def _two_padded(call: dict[str, Any]) -> dict[str, Any]:
    """The first and the last row of a batch, one padded on the left, the other on the right."""
    ids = call["input_ids"]
    few = {"attention_mask": torch.ones_like(ids), **call}
    few.pop("num_items_in_batch", None)
    for name, value in few.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            fill = IGNORED if name == "labels" else 0
            few[name] = torch.stack(
                [nn.functional.pad(value[n], at, value=fill) for n, at in ((0, (2, 0)), (-1, (0, 2)))]
            )
        elif isinstance(value, Tensor) and value.dim() and len(value) == len(ids):
            few[name] = value[[0, -1]]
        elif isinstance(value, list) and len(value) == len(ids):
            few[name] = [value[0], value[-1]]
    return {name: value for name, value in few.items() if value is not None}


def _distance_behind(way: Behind, call: dict[str, Any], expected: Any) -> float:
    """How far the logits of tokens with labels are, when their states are computed and when they are held."""
    store = Store(1 << 62)
    found = []
    for _ in range(2):
        hidden, _, at = way.final(call, store)
        # what all logits of a token have in common would hide how they differ
        logits = [each - each.mean(-1, keepdim=True) for each in (way.parts.logits(hidden), expected.logits[at])]
        found.append(_apart(*logits))
    return max(found)


def _distance(found: Any, expected: Any, names: Sequence[str]) -> float:
    """How far the named values of two outputs are, and what TRL's fused head gives for tokens with labels."""
    if getattr(expected, "logits", None) is None:
        names = [name for name, value in expected.items() if value.is_floating_point()]
    return max(_apart(found[name], expected[name]) for name in names)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors, relative to the second; infinite where a number is none."""
    found, expected = found.float(), expected.float()
    distance = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return math.inf if math.isnan(distance) else distance


@contextmanager
def _without_dropout(layers: list[ReftLayer]) -> Iterator[None]:
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.train()
