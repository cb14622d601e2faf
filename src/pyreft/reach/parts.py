"""A base model in parts: blocks without the head, the head alone, some blocks without the others. Nothing is learned
or held here; edits happen where they are served, see `Stream.serving`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..tuner.edits import Edits
from ..tuner.located import Located
from .blocks import Blocks, replaced
from .cache import Layout, Pair, is_ordinary, pairs_of, prefix_cache, sliding_window
from .window import IGNORED, NotExactError, Rows


@dataclass
class _Final(BaseModelOutputWithPastAndCrossAttentions):
    """Final states, with everything that heads of language models ask for beside them."""

    router_logits: Any = None


class Parts:
    """A model that is run in parts.

    Args:
        base: the model, with a head.
        edits: of its edits.
    """

    def __init__(self, base: Any, edits: Edits) -> None:
        self.base = base
        self.blocks = Blocks(base)
        self.backbone = getattr(base, base.base_model_prefix, base)
        self.windows: list[int | None] = []  # see `sliding_window`; by block, once prefixes were run
        self._edits = edits
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters

    def prefixes(self, ids: Tensor, rows: Rows, positions: Tensor, blocks: int) -> list[list[Pair]]:
        """Run the prefixes of rows, without edits and gradients; return their keys and values in the first blocks.

        Args:
            ids: `[batch, tokens]`.
            positions: `[batch]`, of the first token of each row.
            blocks: how many.

        Raises:
            NotExactError: the model returns no cache, or one that holds more than keys and values.
        """
        with torch.no_grad(), self.blocks.stopping_after(blocks):
            output = self._run(ids, rows.prefixes(), positions, Located(), use_cache=True)
        cache: Any = getattr(output, "past_key_values", None)
        if not is_ordinary(cache):
            raise NotExactError(f"{type(self.base).__name__} returns no cache of keys and values alone")
        self.windows = [sliding_window(layer) for layer in cache.layers]
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
        with torch.no_grad(), self.blocks.stopping_after(blocks) as found:
            self._run(ids, rows, positions, Located(), pairs, range(blocks))
        return found[0]

    def final(
        self,
        ids: Tensor,
        rows: Rows,
        positions: Tensor,
        pairs: Sequence[Sequence[Pair] | None],
        states: Tensor | None,
        skipped: int,
        located: Located,
        **given: Any,
    ) -> Tensor:
        """Run the windows of rows, with edits and gradients, through the blocks from `skipped` on.

        Args:
            pairs: of these blocks, for each row.
            states: the output of the blocks before them, see `states`.
            located: the tokens to edit, `[batch, rows.past + rows.width]`.
            given: what a call may give to edits.

        Returns:
            The states that the head takes, `[batch, rows.width, d]`.
        """
        with self.blocks.starting_after(skipped, states):
            return self._run(ids, rows, positions, located, pairs, range(skipped, len(self.blocks)), **given)[0]

    def layout(self, pairs: Sequence[Pair], skipped: int) -> Layout:
        """How to hold the pairs of the blocks from `skipped` on; `pairs` are those of any row, in all blocks."""
        return Layout(pairs[skipped:], self.windows[skipped:])

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: from final states `[n, d]` to logits `[n, vocabulary]`."""
        return self._head(hidden).logits[0]

    def scored(self, hidden: Tensor, targets: Tensor, **given: Any) -> Any:
        """What the model returns for final states `[n, d]` of one row whose labels are `targets`, `[n]`."""
        labels = nn.functional.pad(targets, (1, 0), value=IGNORED)[None]
        return self._head(nn.functional.pad(hidden, (0, 0, 0, 1)), labels=labels, **given)

    def _head(self, hidden: Tensor, **given: Any) -> Any:
        output = _Final(last_hidden_state=hidden[None])
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self._edits.serving(Located()), replaced({self.base.get_decoder(): lambda *_, **__: output}):
            return self.base.forward(input_ids=ids, use_cache=False, **given)

    def _run(
        self,
        ids: Tensor,
        rows: Rows,
        positions: Tensor,
        located: Located,
        pairs: Sequence[Sequence[Pair] | None] = (),
        blocks: range = range(0),
        *,
        use_cache: bool = False,
        **given: Any,
    ) -> Any:
        if rows.past:
            given["past_key_values"] = prefix_cache(pairs, rows.past, self.windows, blocks)
        if self._takes_positions:
            start = positions - torch.tensor(rows.first, device=rows.device)
            given["position_ids"] = (rows.columns + start[:, None]).clamp(min=0)
        with self._edits.serving(located):
            return self.backbone(
                input_ids=rows.take(ids),
                attention_mask=rows.attention_mask.long(),
                use_cache=use_cache or bool(rows.past),
                **given,
            )
