"""Steps without the prefixes: of a causal model, the windows behind held keys and values of what lies before them.

Of the windows, the blocks below the edits are left out, too, and logits are taken where there are labels.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..positions import IGNORED
from ..tuner.call import GIVEN, LENGTHS, STRENGTH
from ..tuner.located import Located
from ..tuner.packed import find_packed
from ..tuner.registry import Edits
from ..tuner.resolve import locate
from .arguments import COUNT, FUSED, TYPES, columns_of
from .cache import Layout, Pair
from .layers import together
from .loss import log_probs
from .parts import Parts
from .rows import NotExactError, Rows, cut
from .store import Store

_PACKED = "position_ids do not count on in each row, as in packed ones"


@dataclass
class LabelOutput(CausalLMOutputWithPast):
    """The loss, and the log-probability of each label, `[batch, tokens - 1]`, zero where there is none."""

    log_probs: Any = None


@dataclass(frozen=True)
class PrefixPlan:
    """How a batch is cut.

    Args:
        located: the tokens to edit, in whole rows.
        rows: where they are cut.
        columns: how many the ordinary step has, or would have to come to the last position.
    """

    located: Located
    rows: Rows
    columns: int

    @property
    def joined(self) -> int:
        """How many columns prefixes and windows take together, each as long as its longest."""
        return self.rows.past + self.rows.width

    def within(self, columns: int) -> "PrefixPlan":
        """The same with shorter prefixes, so that prefixes and windows take no more columns than these."""
        return PrefixPlan(self.located, self.rows.within(columns), self.columns)


class SkipPrefixes:
    """Steps of a causal model that compute windows alone, and leave out the blocks below the first edit.

    Args:
        parts: the model.
        edits: of the model.
        kept: how many blocks lie below the first edit.
        key: of what the base model computes now.

    Attributes:
        offsets: whether states depend on the number of columns before a row.
        tokens, computed: how many tokens whole steps would have computed, and how many were.
    """

    def __init__(self, parts: Parts, edits: Edits, kept: int, key: bytes) -> None:
        self.parts, self.kept, self.offsets = parts, kept, False
        self.tokens = self.computed = 0
        self.layout: Layout | None = None
        self._edits, self._key = edits, key

    def plan(self, call: dict[str, Any]) -> PrefixPlan:
        """Cut a batch.

        Raises:
            NotExactError: a batch that cannot be cut.
        """
        ids, labels, mask = call["input_ids"], call["labels"], call.get("attention_mask")
        if call.get(TYPES) is not None:
            raise NotExactError(f"{TYPES} are given")
        if labels.shape != ids.shape or (mask is not None and mask.shape != ids.shape):
            raise NotExactError("labels or the attention mask are not [batch, tokens]")
        if find_packed(ids, call) is not None:  # whose labels would be taken for those of one text
            raise NotExactError(_PACKED)
        tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        given = {name: call[name] for name in GIVEN if call.get(name) is not None}
        located = locate(self._edits, tokens, labels, ids, given)
        if located.length > ids.shape[1]:
            raise NotExactError(f"{LENGTHS} exceed the rows")
        rows = cut(tokens, located.masks.values(), labels)
        if (positions := call.get("position_ids")) is not None:
            _check_positions(positions, ids, rows)
        return PrefixPlan(located, rows, columns_of(call))

    def __call__(self, call: dict[str, Any], plan: PrefixPlan, store: Store) -> ModelOutput:
        """Return what the labels of a batch get.

        Raises:
            NotExactError: there are none.
        """
        hidden, targets, (rows, columns) = self.final(call, plan, store)
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

    def final(
        self, call: dict[str, Any], plan: PrefixPlan, store: Store
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return final states `[n, d]` where there are labels, these labels `[n]`, and the rows and columns."""
        ids, rows = call["input_ids"], plan.rows
        targets = rows.take(nn.functional.pad(call["labels"][:, 1:], (0, 1), value=IGNORED))
        at = (rows.valid & (targets != IGNORED)).nonzero(as_tuple=True)
        if not len(at[0]):
            raise NotExactError("a batch has no labels")
        positions = self._positions(call.get("position_ids"), rows)
        pairs, states = self._held(ids, rows, positions, store)
        given = {STRENGTH: call[STRENGTH]} if call.get(STRENGTH) is not None else {}
        hidden = self.parts.final(ids, rows, positions, pairs, states, self.kept, _move(plan.located, rows), given)
        self.tokens += ids.numel()
        self.computed += rows.valid.numel()
        return hidden[at], targets[at], (at[0], rows.columns[at])

    def _positions(self, given: Tensor | None, rows: Rows) -> Tensor:
        """The position of the first token of each row, `[batch]`, from which the others count on."""
        first = torch.tensor(rows.first, device=rows.device)
        if given is not None:
            return given.gather(1, first[:, None])[:, 0]
        return first if self.offsets else torch.zeros_like(first)

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
        return pairs, together([states[key] for key in state_keys], rows.width, self.parts.blocks, self.kept)

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
            known = self._key + f"{position} {start - first} {ids.dtype} ".encode()
            prefixes.append(xxhash.xxh3_128_digest(known + row[first:start].tobytes()) if start > first else b"")
            states.append(xxhash.xxh3_128_digest(known + b"states" + row[first:end].tobytes()))
        return prefixes, states


def _check_positions(given: Tensor, ids: Tensor, rows: Rows) -> None:
    """Refuse positions that do not count on from the first token of each row."""
    if given.shape != ids.shape:
        raise NotExactError("position_ids are not [batch, tokens]")
    first, end = (torch.tensor(columns, device=rows.device)[:, None] for columns in (rows.first, rows.end))
    columns = torch.arange(given.shape[1], device=rows.device)
    counted = given.gather(1, first) + columns - first
    if not bool(((given == counted) | (columns < first) | (columns >= end)).all()):
        raise NotExactError(_PACKED)


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
