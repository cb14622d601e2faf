"""The two ways to compute a step in part: behind held prefixes, or above held states. Both take what they can from a
store and put into it what they had to run. Whether a way is exact for a model, `step` finds out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..tuner.call import GIVEN, LENGTHS, STRENGTH
from ..tuner.edits import Edits
from ..tuner.located import Located
from ..tuner.resolve import locate
from .blocks import Blocks
from .cache import Layout, Pair
from .loss import log_probs
from .parts import Parts
from .store import Store
from .window import IGNORED, NotExactError, Rows, bounds, cut

TYPES = "token_type_ids"
BY_TOKEN = ("input_ids", "attention_mask", "position_ids", TYPES)  # beside the labels
COUNT = "num_items_in_batch"
FUSED = "fused_lm_head"  # TRL's: the call returns values of the labels alone, zero for tokens without one


@dataclass
class LabelOutput(CausalLMOutputWithPast):
    """The loss, and the log-probability of each label, `[batch, tokens - 1]`, zero where there is none."""

    log_probs: Any = None


class Behind:
    """The way of causal models: the windows behind the prefixes, above the states of the blocks below the edits.

    Args:
        parts: the model.
        edits: of its edits.
        kept: how many blocks lie below the first edit.
        offsets: whether states depend on the number of columns before a row.
        key: of what the base model computes now.
    """

    def __init__(self, parts: Parts, edits: Edits, kept: int, offsets: bool, key: bytes) -> None:
        self.parts, self.kept, self.tokens, self.computed = parts, kept, 0, 0
        self._edits, self.offsets, self._key = edits, offsets, key
        self.layout: Layout | None = None

    def __call__(self, call: dict[str, Any], ordinary: Callable[..., Any], store: Store) -> ModelOutput:
        """Return what the labels of a batch get."""
        hidden, targets, (rows, columns) = self.final(call, store)
        count = call.get(COUNT)

        def spread(values: Tensor) -> Tensor:
            ids = call["input_ids"]
            return values.new_zeros(len(ids), ids.shape[1] - 1).index_put((rows, columns), values)

        if call.get(FUSED):
            output = self.parts.scored(hidden, targets, **{FUSED: True, COUNT: count})
            by_token = {name: value for name, value in output.items() if value.shape == (1, len(targets))}
            return type(output)(**output | {name: spread(value[0]) for name, value in by_token.items()})
        found = log_probs(hidden, targets, self.parts.logits, self.parts.base.config.get_text_config().vocab_size)
        total = len(found) if count is None else torch.as_tensor(count, device=found.device)
        return LabelOutput(loss=-found.sum() / total, log_probs=spread(found))

    def final(self, call: dict[str, Any], store: Store) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return final states `[n, d]` where there are labels, these labels `[n]`, and the rows and columns.

        Raises:
            NotExactError: a batch that this way cannot take.
        """
        ids = call["input_ids"]
        located, rows = self._cut(call)
        targets = rows.take(nn.functional.pad(call["labels"][:, 1:], (0, 1), value=IGNORED))
        at = (rows.valid & (targets != IGNORED)).nonzero(as_tuple=True)
        if not len(at[0]):
            raise NotExactError("a batch has no labels")
        positions = self._positions(call, rows)
        pairs, states = self._held(ids, rows, positions, store)
        given = {STRENGTH: call[STRENGTH]} if call.get(STRENGTH) is not None else {}
        hidden = self.parts.final(ids, rows, positions, pairs, states, self.kept, _move(located, rows), **given)
        self.tokens += ids.numel()
        self.computed += rows.valid.numel()
        return hidden[at], targets[at], (at[0], rows.columns[at])

    def cut_at(self, call: dict[str, Any]) -> tuple[Tensor, Rows]:
        """The tokens of a batch that are edited, `[batch, tokens]`, and its rows."""
        located, rows = self._cut(call)
        return torch.stack(list(located.masks.values())).any(0), rows

    def _cut(self, call: dict[str, Any]) -> tuple[Located, Rows]:
        ids, labels, mask = call["input_ids"], call["labels"], call.get("attention_mask")
        if call.get(TYPES) is not None:
            raise NotExactError(f"{TYPES} are given")
        if labels.shape != ids.shape or (mask is not None and mask.shape != ids.shape):
            raise NotExactError("labels or the attention mask are not [batch, tokens]")
        tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        given = {name: call[name] for name in GIVEN if call.get(name) is not None}
        located = locate(self._edits, tokens, labels, ids, given)
        if located.length > ids.shape[1]:
            raise NotExactError(f"{LENGTHS} exceed the rows")
        return located, cut(tokens, located.masks.values(), labels)

    def _positions(self, call: dict[str, Any], rows: Rows) -> Tensor:
        """The position of the first token of each row, `[batch]`, from which the others count on."""
        first, given = torch.tensor(rows.first, device=rows.device), call.get("position_ids")
        if given is None:
            return first if self.offsets else torch.zeros_like(first)
        if given.shape != call["input_ids"].shape:
            raise NotExactError("position_ids are not [batch, tokens]")
        begin = given.gather(1, first[:, None])
        at = torch.arange(given.shape[1], device=rows.device) - first[:, None]
        beyond = torch.tensor(rows.end, device=rows.device)[:, None] - first[:, None]
        if not bool(((given == begin + at) | (at < 0) | (at >= beyond)).all()):
            raise NotExactError("position_ids do not count on in each row, as in packed ones")
        return begin[:, 0]

    def _held(
        self, ids: Tensor, rows: Rows, positions: Tensor, store: Store
    ) -> tuple[list[list[Pair] | None], Tensor | None]:
        """The keys and values of the prefixes above the kept blocks, by row, and the kept states."""
        prefix_keys, state_keys = self._keys(ids, rows, positions)
        states = {key: store.get(key) for key in dict.fromkeys(state_keys)} if self.kept else {}
        lacking = [state_keys.index(key) for key, held in states.items() if held is None]
        whole, above = self._prefixes(ids, rows, positions, store, prefix_keys, {prefix_keys[row] for row in lacking})
        pairs = [above.get(key) for key in prefix_keys]
        if not self.kept:
            return pairs, None
        if lacking:
            few, behind = rows.select(lacking), [whole.get(prefix_keys[row]) for row in lacking]
            run = self.parts.states(ids[lacking], few, positions[lacking], behind, self.kept)
            for row, output, start, end in zip(lacking, run, few.start, few.end, strict=True):
                states[state_keys[row]] = state = [output[: end - start].clone()]  # a view would hold the whole batch
                store.put(state_keys[row], state)
        return pairs, _together([states[key] for key in state_keys], rows.width, self.parts.blocks, self.kept)

    def _prefixes(
        self, ids: Tensor, rows: Rows, positions: Tensor, store: Store, keys: list[bytes], again: set[bytes]
    ) -> tuple[dict[bytes, list[Pair]], dict[bytes, list[Pair]]]:
        """By key, the pairs in the first blocks of what was run now, and those above the kept blocks of all.

        Args:
            keys: of the rows' prefixes, empty for a row without one.
            again: those which must be run even if they are held, for what happens below the kept blocks.
        """
        packed = {key: store.get(key) if self.layout else None for key in dict.fromkeys(keys) if key}
        unknown = [key for key, held in packed.items() if held is None]
        wanted = [key for key in packed if key in again or packed[key] is None]
        whole: dict[bytes, list[Pair]] = {}
        if wanted:
            which, blocks = [keys.index(key) for key in wanted], len(self.parts.blocks) if unknown else self.kept
            run = self.parts.prefixes(ids[which], rows.select(which), positions[which], blocks)
            whole = dict(zip(wanted, run, strict=True))
            self.layout = self.layout or self.parts.layout(run[0], self.kept)
        above = {key: whole[key][self.kept :] for key in unknown}
        for key in unknown:
            store.put(key, cast(Layout, self.layout).pack(above[key]))
        for key, held in packed.items():
            if held is not None:
                above[key] = cast(Layout, self.layout).unpack(held)
        return whole, above

    def _keys(self, ids: Tensor, rows: Rows, positions: Tensor) -> tuple[list[bytes], list[bytes]]:
        """For each row the keys of its prefix, empty if it has none, and of its kept states."""
        prefixes, states = [], []
        cuts = zip(rows.first, rows.start, rows.end, positions.tolist(), ids.cpu().numpy(), strict=True)
        for first, start, end, position, row in cuts:
            known = self._key + f"{position} {start - first} ".encode()
            prefixes.append(xxhash.xxh3_128_digest(known + row[first:start].tobytes()) if start > first else b"")
            states.append(xxhash.xxh3_128_digest(known + b"states" + row[first:end].tobytes()))
        return prefixes, states


class Above:
    """The way of any other model: whole rows, above the states of the blocks below the edits.

    Args:
        parts, edits, kept, key: see `Behind`.
        padding: whether the states of padding matter, too, as where a head reads the first column.
    """

    def __init__(self, parts: Parts, edits: Edits, kept: int, padding: bool, key: bytes) -> None:
        self.parts, self.kept, self.padding = parts, kept, padding
        self._edits = edits
        self._key = key

    def __call__(self, call: dict[str, Any], ordinary: Callable[..., Any], store: Store) -> Any:
        """Return what the model returns."""
        ids = call["input_ids"]
        inputs = {name: call[name] for name in BY_TOKEN if call.get(name) is not None}
        if any(value.shape != ids.shape for value in inputs.values()):
            raise NotExactError("inputs are not [batch, tokens]")
        mask = inputs.get("attention_mask")
        first, last = bounds(torch.ones_like(ids, dtype=torch.bool) if mask is None or self.padding else mask.bool())
        spans = list(zip(first.tolist(), last.tolist(), strict=True))
        keys = self._keys(inputs, spans)
        states = {key: store.get(key) for key in dict.fromkeys(keys)}
        lacking = [keys.index(key) for key, held in states.items() if held is None]
        if lacking:
            with torch.no_grad(), self._edits.serving(Located()), self.parts.blocks.stopping_after(self.kept) as found:
                self.parts.backbone(**{name: value[lacking] for name, value in inputs.items()})
            for row, output in zip(lacking, found[0], strict=True):
                states[keys[row]] = state = [output[slice(*spans[row])].clone()]
                store.put(keys[row], state)
        rows = [states[key] for key in keys]
        below = _together(rows, ids.shape[1], self.parts.blocks, self.kept, [first for first, _ in spans])
        with self.parts.blocks.starting_after(self.kept, below):
            return ordinary(**call)

    def _keys(self, inputs: dict[str, Tensor], spans: list[tuple[int, int]]) -> list[bytes]:
        digests = [xxhash.xxh3_128(self._key + f"whole {first} {list(inputs)}".encode()) for first, _ in spans]
        for value in inputs.values():
            for digest, row, span in zip(digests, value.cpu().numpy(), spans, strict=True):
                digest.update(row[slice(*span)].tobytes())
        return [digest.digest() for digest in digests]


def _together(
    rows: list[list[Tensor] | None], width: int, blocks: Blocks, kept: int, starts: Sequence[int] = ()
) -> Tensor:
    """Held states, `[tokens, d]` by row, as the output `[batch, width, d]` of the kept blocks, with zeros elsewhere."""
    states = [cast(list[Tensor], held)[0] for held in rows]
    shape = len(states), width, states[0].shape[-1]
    joined = torch.zeros(shape, dtype=states[0].dtype, device=blocks.device_of(kept - 1))
    for row, (state, start) in enumerate(zip(states, starts or [0] * len(states), strict=True)):
        joined[row, start : start + len(state)] = state
    return joined


def _move(located: Located, rows: Rows) -> Located:
    """Locations in whole rows as those behind prefixes, `[batch, rows.past + rows.width]`."""
    moved = Located()
    moved.subspaces = located.subspaces
    made: dict[int, Tensor] = {}
    for key, mask in located.masks.items():
        if id(mask) not in made:
            made[id(mask)] = nn.functional.pad(rows.take(mask) & rows.valid, (rows.past, 0))
        moved.add(key, made[id(mask)])
    return moved
