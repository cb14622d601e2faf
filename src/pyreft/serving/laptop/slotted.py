"""The adapters that are in slots of a model, and the edit of its states behind each block.

Which tokens a step edits comes with the step, which the thread that computes it holds; nothing of it is kept on the
model. Knows nothing of names, batches or requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...places.components import find_site
from ...places.lookup import Columns, Site
from ...places.structure import find_blocks, hidden_width
from ..bank import Bank, Slots
from ..served import Adapter
from ..tokens import Row, Step

_running: ContextVar[tuple[Any, Step | None]] = ContextVar("running", default=(None, None))


class Edits:
    """Slots for adapters, and hooks on the blocks of a model that edit the tokens of the step that runs.

    Args:
        model: a causal language model; its blocks get hooks, and stay as they are.
        slots: how many adapters are in memory at once.
        rank: the greatest number of coordinates of an adapter's edit, see `affine.rank_of`.
    """

    def __init__(self, model: nn.Module, *, slots: int, rank: int) -> None:
        self.slots = Slots(slots)
        self.device = next(model.parameters()).device
        self.bank = Bank(slots=slots, rank=rank, width=hidden_width(model), device=self.device)
        self.loads = 0  # how often an adapter was put into a slot
        self.model = model
        self._sites: dict[tuple[str, int], Site] = {}
        self._hooked: set[tuple[int, str]] = set()
        blocks = find_blocks(model)[1]
        blocks[0].register_forward_pre_hook(self._edit_input, with_kwargs=True)
        for number, block in enumerate(blocks):
            block.register_forward_hook(partial(self._edit_output, number))

    def take(self, adapter: Adapter, prompt: int, strength: float) -> Row:
        """Return the row of one more request with an adapter, which is in a slot until `release`.

        Args:
            prompt: how many tokens the request's prompt has.

        Raises:
            ReftError: no slot is free (see `Slots.has_room`), or the adapter does not fit.
        """
        slot = self.slots.take(adapter.digest, partial(self._load, adapter))
        return adapter.row(slot, prompt, strength)

    def release(self, adapter: Adapter) -> None:
        """A request with this adapter has left."""
        self.slots.release(adapter.digest)

    @contextmanager
    def during(self, step: Step | None) -> Iterator[None]:
        """Edit what this thread computes within it."""
        token = _running.set((self, step))
        try:
            yield
        finally:
            _running.reset(token)

    def _step(self) -> Step | None:
        edits, step = _running.get()
        return step if edits is self else None

    def _load(self, adapter: Adapter, slot: int) -> None:
        self.bank.write(slot, adapter.edits(self._site))
        for layer, part in self.bank.inside.keys() - self._hooked:  # only what is edited costs a hook
            site = self._site(part, layer)
            hook = partial(self._edit_part, (layer, part), site.columns or Columns(0, site.width))
            self.model.get_submodule(site.path).register_forward_hook(hook)
            self._hooked.add((layer, part))
        self.loads += 1

    def _site(self, part: str, layer: int) -> Site:
        """Where a component of a block is that a linear layer writes."""
        if (part, layer) not in self._sites:
            self._sites[part, layer] = find_site(self.model, part, layer, linear=True)
        return self._sites[part, layer]

    def _edit_output(self, layer: int, block: nn.Module, args: tuple, output: Any) -> Any:
        if (step := self._step()) is None:
            return None
        if isinstance(output, Tensor):
            return self._edit(layer, step, output)
        return type(output)((self._edit(layer, step, output[0]), *output[1:]))

    def _edit_input(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if (step := self._step()) is None:
            return None
        if args:
            return (self._edit(-1, step, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._edit(-1, step, kwargs["hidden_states"])}

    def _edit(self, layer: int, step: Step, states: Tensor) -> Tensor:
        """Return the states `[rows, tokens, d]` behind a block with the step's tokens edited."""
        places = [place for place in self.bank.behind.get(layer, ()) if step.tiles(place, states.device)]
        if not places:
            return states
        h = states.flatten(0, 1).clone()  # what is edited in place may be the input of others, too
        for place in places:
            self.bank.edit_in(step, place, h)
        return h.view_as(states)

    def _edit_part(self, key: tuple[int, str], columns: Columns, module: nn.Module, args: tuple, output: Tensor) -> Any:
        if (step := self._step()) is None:
            return None
        places = [place for place in self.bank.inside.get(key, ()) if step.tiles(place, output.device)]
        if not places:
            return None
        read, written = args[0].flatten(0, -2), output.flatten(0, -2).clone()
        part = columns.take(written)
        for place in places:
            self.bank.edit_in(step, place, part, read=read)
        return (written if columns.groups == 1 else columns.put(written, part)).view_as(output)
