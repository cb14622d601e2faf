"""Rows of tokens side by side in one forward: padded on the left, so that all end in the same column.

Rows may have different lengths, come from other batches and leave at any time; what attention keeps of them comes and
goes with them. Knows nothing of requests, slots or sampling.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...errors import ReftError
from ...tuner.caches import cache_name
from ..tokens import Row, plan
from .slotted import Edits


class Batch:
    """Rows that are computed together.

    Args:
        model: a causal language model.
        edits: on this model.
        lengths: of the rows' prompts, none of which is computed yet.
        rows: what is edited in each, none for nothing.
    """

    def __init__(self, model: Any, edits: Edits, lengths: Sequence[int], rows: Sequence[Row | None]) -> None:
        self.model, self.edits, self.rows = model, edits, list(rows)
        self.columns = 0  # that are computed
        self.first = torch.tensor([max(lengths) - length for length in lengths])  # of each row, its first column
        self._cache = DynamicCache()  # of all tokens, also where a model's own would forget those out of a window
        self._name = cache_name(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def compute(self, ids: Tensor, last: bool = True) -> Tensor:
        """Compute further columns.

        Args:
            ids: `[rows, columns]`; anything in the columns before a row's first.
            last: return the logits behind the last column alone.

        Returns:
            `[rows, 1 or columns, vocabulary]`.
        """
        count, width = ids.shape
        end, device = self.columns + width, self.edits.device
        at = torch.arange(end)
        options: dict[str, Any] = {"logits_to_keep": 1} if last and self._keeps else {}
        present = {number: row for number, row in enumerate(self.rows) if row is not None}
        computed = (self.columns - self.first).tolist()  # below 0 before a row's first token
        step = plan(present, [number * width for number in range(count + 1)], computed) if present else None
        with torch.no_grad(), self.edits.during(step):
            logits = self.model(
                input_ids=ids.to(device),
                attention_mask=(at >= self.first[:, None]).long().to(device),
                position_ids=(at[self.columns :] - self.first[:, None]).clamp(min=0).to(device),
                use_cache=True,
                **{self._name: self._cache},
                **options,
            ).logits
        self.columns = end
        return logits[:, -1:] if last else logits

    def select(self, numbers: Sequence[int]) -> None:
        """Keep these rows, at least one, in this order; one may be there several times. Columns that none has go."""
        index = torch.tensor(numbers, dtype=torch.long)
        self.rows = [self.rows[number] for number in numbers]
        self.first = self.first[index]
        cut = min(int(self.first.min()), self.columns)
        for layer in self._cache.layers:
            there = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[there, :, cut:], layer.values[there, :, cut:]
        self.first, self.columns = self.first - cut, self.columns - cut

    def join(self, other: "Batch") -> None:
        """Take the rows of another batch, behind those here."""
        columns = max(self.columns, other.columns)
        for layer, more in zip(self._cache.layers, other._cache.layers, strict=True):
            layer.keys = torch.cat((_widened(layer.keys, columns), _widened(more.keys, columns)))
            layer.values = torch.cat((_widened(layer.values, columns), _widened(more.values, columns)))
        firsts = (batch.first + columns - batch.columns for batch in (self, other))
        self.first, self.columns = torch.cat(tuple(firsts)), columns
        self.rows += other.rows


def _widened(states: Tensor, columns: int) -> Tensor:
    """`[rows, heads, columns, width]` with further columns of zeros before them."""
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[2], 0))


def check_batches(model: Any, edits: Edits) -> int:
    """Refuse a model whose rows are not computed the same beside others, in parts and padded, as alone.

    Such are models that keep a recurrent state, or that count positions from the first column. Returns how many bytes
    the keys and values of a token take.

    Raises:
        ReftError: it is one.
    """
    vocabulary = model.config.get_text_config().vocab_size
    texts = [[number * 7919 % vocabulary for number in range(start, 9)] for start in (1, 5)]
    try:
        alone = [Batch(model, edits, [len(ids)], [None]).compute(torch.tensor([ids])) for ids in texts]
        one, two = (Batch(model, edits, [len(ids)], [None]) for ids in texts)
        one.compute(torch.tensor([texts[0][:6]]))
        one.compute(torch.tensor([texts[0][6:7]]))
        two.compute(torch.tensor([texts[1][:3]]))
        two.join(one)
        together = two.compute(torch.tensor([[texts[1][3]], [texts[0][7]]]))
        two.select([1, 0])
        kept = [part for layer in two._cache.layers for part in (layer.keys, layer.values)]
    except Exception as error:
        raise ReftError(
            f"{type(model).__name__} cannot be computed in batches that rows join and leave ({error}); serve it with "
            "--engine vllm.",
            setting="model",
        ) from error
    for expected, found in zip(reversed(alone), together, strict=True):
        if (found - expected[0]).norm() > 0.05 * expected.norm():
            raise ReftError(
                f"{type(model).__name__} computes a text differently beside others than alone, so it cannot be "
                "served in batches; serve it with --engine vllm.",
                setting="model",
            )
    return sum(part[0, :, 0].numel() * part.element_size() for part in kept)
