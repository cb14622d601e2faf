"""A base model in parts: blocks without the unembedding, this alone, some blocks without the others.

Nothing is learned or held here, and nothing of the model is changed, so another thread may call it meanwhile.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..places.structure import path_of
from ..positions import IGNORED
from ..tuner.caches import cache_name, cache_of
from ..tuner.located import Located
from ..tuner.registry import Edits
from .blocks import Blocks
from .cache import Layout, Pair, empty_cache, is_ordinary, pairs_of, prefix_cache, sliding_window
from .rows import NotExactError, Rows
from .views import view


@dataclass
class _Final(BaseModelOutputWithPastAndCrossAttentions):
    """Final states, with everything that language models ask their decoders for beside them."""

    router_logits: Any = None


class Parts:
    """A model that is run in parts.

    Args:
        base: the model.
        outer: it, or what another kind of adapter has put around it.
        edits: of the model.
    """

    def __init__(self, base: Any, outer: nn.Module, edits: Edits) -> None:
        self.base, self.outer = base, outer
        self.backbone = getattr(base, base.base_model_prefix, base)
        self.blocks = Blocks(base, {outer, self.backbone})
        self.sliding: list[int | None] = []  # see `sliding_window`; by block, once prefixes were run
        self._edits = edits
        self._cache = cache_name(self.backbone)
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters

    def edited(self, located: Located, given: dict[str, Any] | None = None) -> AbstractContextManager[None]:
        """Let the forwards inside edit these tokens, in the columns of cache and inputs, and no others."""
        return self._edits.serving(located, given)

    # -- of whole rows --------------------------------------------------------------------------------------------

    def below(self, count: int, **inputs: Tensor) -> Tensor:
        """Run rows through the first blocks, without edits and gradients; return their output, `[batch, tokens, d]`."""
        with torch.no_grad(), self.edited(Located()):
            return self.blocks.states(self.outer, count, **inputs)

    def above(self, count: int, states: Tensor, **call: Any) -> Any:
        """What a call of the model returns, with the output of its first blocks given, `[batch, tokens, d]`."""
        return self.blocks.above(self.outer, count, states)(**call)

    # -- of causal models -----------------------------------------------------------------------------------------

    def prefixes(self, ids: Tensor, rows: Rows, positions: Tensor, blocks: int) -> list[list[Pair]]:
        """Run the prefixes of rows, without edits and gradients; return their keys and values in the first blocks.

        Args:
            ids: `[batch, tokens]`.
            positions: `[batch]`, of the first token of each row.
            blocks: how many.

        Raises:
            NotExactError: the model returns no cache, or one that holds more than keys and values.
        """
        call = self._call(ids, rows.prefixes(), positions) | {"use_cache": True}
        with torch.no_grad(), self.edited(Located()):
            if blocks < len(self.blocks):
                cache: Any = empty_cache(self.sliding)
                self.blocks.states(self.backbone, blocks, **{self._cache: cache}, **call)
            elif is_ordinary(cache := cache_of(self.backbone(**call))):
                self.sliding = [sliding_window(layer) for layer in cache.layers]
            else:
                raise NotExactError(f"{type(self.base).__name__} returns no cache of keys and values alone")
        return [pairs_of(cache, row, length, blocks) for row, length in enumerate(rows.prefix_lengths)]

    def states(
        self, ids: Tensor, rows: Rows, positions: Tensor, pairs: Sequence[Sequence[Pair] | None], blocks: int
    ) -> Tensor:
        """Run the windows of rows through the first blocks, without edits and gradients; return their output.

        Args:
            pairs: of these blocks, for each row.

        Returns:
            `[batch, rows.width, d]`.
        """
        call = self._call(ids, rows, positions, pairs, range(blocks))
        with torch.no_grad(), self.edited(Located()):
            return self.blocks.states(self.backbone, blocks, **call)

    def final(
        self,
        ids: Tensor,
        rows: Rows,
        positions: Tensor,
        pairs: Sequence[Sequence[Pair] | None],
        states: Tensor | None,
        skipped: int,
        located: Located,
        given: dict[str, Any],
    ) -> Tensor:
        """Run the windows of rows, with edits and gradients, through the blocks from `skipped` on.

        Args:
            pairs: of these blocks, for each row.
            states: the output of the blocks before them, see `states`.
            located: the tokens to edit, `[batch, rows.past + rows.width]`.
            given: what a call may give to edits.

        Returns:
            The states that the unembedding takes, `[batch, rows.width, d]`.
        """
        call = self._call(ids, rows, positions, pairs, range(skipped, len(self.blocks)))
        with self.edited(located, given):
            return self.blocks.above(self.backbone, skipped, states)(**call)[0]

    def layout(self, pairs: Sequence[Pair], skipped: int) -> Layout:
        """How to hold the pairs of the blocks from `skipped` on; `pairs` are those of any row, in all blocks."""
        return Layout(pairs[skipped:], self.sliding[skipped:])

    def logits(self, hidden: Tensor) -> Tensor:
        """The unembedding: from final states `[n, d]` to logits `[n, vocabulary]`."""
        return self._unembed(hidden).logits[0]

    def scored(self, hidden: Tensor, targets: Tensor, **given: Any) -> Any:
        """What the model returns for final states `[n, d]` of one row whose labels are `targets`, `[n]`."""
        labels = nn.functional.pad(targets, (1, 0), value=IGNORED)[None]
        return self._unembed(nn.functional.pad(hidden, (0, 0, 0, 1)), labels=labels, **given)

    def _unembed(self, hidden: Tensor, **given: Any) -> Any:
        """The model's own code around its decoder, which returns final states `[n, d]` of one row."""
        output = _Final(last_hidden_state=hidden[None])

        def decode(*args: Any, **kwargs: Any) -> _Final:
            return output

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self.edited(Located()):
            return view(self.base, {self._decoder: decode}).forward(input_ids=ids, use_cache=False, **given)

    @cached_property
    def _decoder(self) -> str:
        return path_of(self.base, self.base.get_decoder())

    def _call(
        self,
        ids: Tensor,
        rows: Rows,
        positions: Tensor,
        pairs: Sequence[Sequence[Pair] | None] = (),
        blocks: range = range(0),
    ) -> dict[str, Any]:
        """The inputs of a forward over the windows of rows, behind their prefixes."""
        call: dict[str, Any] = {
            "input_ids": rows.take(ids),
            "attention_mask": rows.attention_mask.long(),
            "use_cache": bool(rows.past),
        }
        if rows.past:
            call[self._cache] = prefix_cache(pairs, rows.past, self.sliding, blocks)
        if self._takes_positions:
            start = positions - torch.tensor(rows.first, device=rows.device)
            call["position_ids"] = (rows.columns + start[:, None]).clamp(min=0)
        return call
