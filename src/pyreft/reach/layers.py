"""Steps without the layers below the edits: whole rows, above the held output of the blocks that nothing can change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

from .arguments import BY_TOKEN, columns_of
from .blocks import Blocks
from .parts import Parts
from .rows import NotExactError, bounds
from .store import Store


@dataclass(frozen=True)
class LayerPlan:
    """What the states below the edits depend on.

    Args:
        inputs: `[batch, tokens]` each.
        spans: the columns of each row that are held, `[start, end)`.
        columns: how many the batch has, or would have to come to the last position.
    """

    inputs: dict[str, Tensor]
    spans: list[tuple[int, int]]
    columns: int


class SkipLayers:
    """Steps of any model that leave out the blocks below the first edit.

    Args:
        parts: the model.
        kept: how many these are.
        padding: whether the states of padding matter, too, as where a classifier reads the first column.
        key: of what the base model computes now.
    """

    def __init__(self, parts: Parts, kept: int, padding: bool, key: bytes) -> None:
        self.parts, self.kept, self.padding, self._key = parts, kept, padding, key

    def plan(self, call: dict[str, Any]) -> LayerPlan:
        """Say what a batch needs.

        Raises:
            NotExactError: inputs of another shape.
        """
        ids = call["input_ids"]
        inputs = {name: call[name] for name in BY_TOKEN if call.get(name) is not None}
        if any(value.shape != ids.shape for value in inputs.values()):
            raise NotExactError("inputs are not [batch, tokens]")
        mask = inputs.get("attention_mask")
        first, last = bounds(torch.ones_like(ids, dtype=torch.bool) if mask is None or self.padding else mask.bool())
        return LayerPlan(inputs, list(zip(first.tolist(), last.tolist(), strict=True)), columns_of(call))

    def __call__(self, call: dict[str, Any], plan: LayerPlan, store: Store) -> Any:
        """Return what the model returns."""
        inputs, spans, ids = plan.inputs, plan.spans, call["input_ids"]
        keys = self._keys(inputs, spans)
        states = {key: store.get(key) for key in dict.fromkeys(keys)}
        lacking = [keys.index(key) for key, held in states.items() if held is None]
        if lacking:
            run = self.parts.below(self.kept, **{name: value[lacking] for name, value in inputs.items()})
            for row, output in zip(lacking, run, strict=True):
                states[keys[row]] = state = [output[slice(*spans[row])].clone()]
                store.put(keys[row], state)
        rows = [states[key] for key in keys]
        below = together(rows, ids.shape[1], self.parts.blocks, self.kept, [first for first, _ in spans])
        return self.parts.above(self.kept, below, **call)

    def _keys(self, inputs: dict[str, Tensor], spans: list[tuple[int, int]]) -> list[bytes]:
        kinds = [(name, str(value.dtype)) for name, value in inputs.items()]
        digests = [xxhash.xxh3_128(self._key + f"whole {span} {kinds}".encode()) for span in spans]
        for value in inputs.values():
            for digest, row, span in zip(digests, value.cpu().numpy(), spans, strict=True):
                digest.update(row[slice(*span)].tobytes())
        return [digest.digest() for digest in digests]


def together(
    rows: list[list[Tensor] | None], width: int, blocks: Blocks, kept: int, starts: Sequence[int] = ()
) -> Tensor:
    """Held states, `[tokens, d]` by row, as the output `[batch, width, d]` of the kept blocks, with zeros elsewhere."""
    states = [cast(list[Tensor], held)[0] for held in rows]
    shape = len(states), width, states[0].shape[-1]
    joined = torch.zeros(shape, dtype=states[0].dtype, device=blocks.device_of(kept - 1))
    for row, (state, start) in enumerate(zip(states, starts or [0] * len(states), strict=True)):
        joined[row, start : start + len(state)] = state
    return joined
