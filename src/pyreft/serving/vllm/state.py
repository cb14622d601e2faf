"""A worker's side of an engine: its bank, the rows of its batch, and the edit of a block's states in a step."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bank import Bank, Slots
from ..catalog import Store
from ..fixed import FixedBank
from ..served import Adapter
from ..tokens import Place, Row, Step, plan
from .flags import Settings, check_config, replays, shape_of
from .inside import Inside


@dataclass(eq=False)
class _Request:
    """A request in the batch."""

    digest: str
    strength: float
    prompt: int
    row: Row | None = None


class ReftState:
    """What the workers of one engine know of adapters, in one process.

    Args:
        vllm_config: of the engine.
    """

    _all: ClassVar[dict[str, "ReftState"]] = {}  # by the engine: a process may hold several
    _running = threading.local()

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.settings = Settings.of(vllm_config)
        self.shape = shape_of(vllm_config)
        self.store = Store(self.settings.store)
        self.device = torch.device(vllm_config.device_config.device)
        self.slots = Slots(self.settings.slots)
        self.bank: Bank | FixedBank = Bank(**self._sizes())
        self._batch: dict[int, _Request] = {}  # by the number of the row
        self._settled: set[_Request] = set()  # those that have a slot
        self.rows: dict[int, Row] = {}  # as of the last `settle`
        self.step: Step | None = None
        self.layers: list[int] = list(range(-1, self.shape["num_hidden_layers"]))
        self.inside: Inside | None = None  # of the model's blocks, once they are there
        self.counts = {"steps": 0, "edited_steps": 0, "loads": 0}

    def _sizes(self) -> dict[str, Any]:
        settings, width = self.settings, self.shape["hidden_size"]
        return {"slots": settings.slots, "rank": settings.rank, "width": width, "device": self.device}

    def have(self, blocks: Sequence[int]) -> None:
        """This process has these blocks of the model, and others have the others. What is fixed is made now."""
        self.layers = [*([-1] if 0 in blocks else []), *blocks]  # behind which an edit is one of this process
        if replays(self.vllm_config):
            places = [Place(layer, 0) for layer in self.layers]
            tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
            self.bank = FixedBank(places, tokens=tokens, **self._sizes())

    @classmethod
    def of(cls, vllm_config: Any) -> "ReftState":
        """The one of an engine in this process."""
        key = vllm_config.instance_id
        if key not in cls._all:
            cls._all[key] = cls(vllm_config)
        return cls._all[key]

    def add(self, number: int, asked: tuple[str, float] | None, prompt: int) -> None:
        """A request takes a row: the digest and the strength that it asks for, none for the base model."""
        self._batch.pop(number, None)
        if asked is not None:
            self._batch[number] = _Request(*asked, prompt)

    def remove(self, number: int) -> None:
        """A row is free."""
        self._batch.pop(number, None)

    def move(self, old: int, new: int, swap: bool) -> None:
        """A request goes to another row; what is there goes, or takes the old one."""
        one, two = self._batch.pop(old, None), self._batch.pop(new, None)
        if one is not None:
            self._batch[new] = one
        if two is not None and swap:
            self._batch[old] = two

    def settle(self) -> None:
        """All rows of a step are known: those that have left give up their slots, and only then others take one."""
        here = set(self._batch.values())
        for request in self._settled - here:
            self.slots.release(request.digest)
        for request in (request for request in self._batch.values() if request.row is None):
            adapter = self.store.get(request.digest)
            slot = self.slots.take(request.digest, partial(self._load, adapter))
            request.row = adapter.row(slot, request.prompt, request.strength)
        self._settled = here
        self.rows = {number: request.row for number, request in self._batch.items() if request.row is not None}

    def _load(self, adapter: Adapter, slot: int) -> None:
        check_config(adapter, self.vllm_config)
        edits = adapter.edits(self.inside.site if self.inside is not None else None)
        own = {place: edit for place, edit in edits.items() if place.layer in self.layers}
        for place in own:
            if place.part and self.inside is not None:
                self.inside.hook(place.layer, place.part)
        self.bank.write(slot, own)
        self.counts["loads"] += 1

    def plan(self, starts: Sequence[int], computed: Sequence[int], order: Sequence[int] | None = None) -> None:
        """Find what the step edits that now begins; see `tokens.plan`.

        Args:
            starts, computed: of the step.
            order: which of the rows here each of the step's is, if it has an order of its own.
        """
        rows = self.rows
        if order is not None and rows:
            rows = {number: rows[row] for number, row in enumerate(order) if row in rows}
        self.step = plan(rows, starts, computed) if rows else None
        self.bank.begin(self.step, starts[-1])
        self.counts["steps"] += 1
        self.counts["edited_steps"] += self.step is not None

    def plan_nothing(self) -> None:
        """The step that now begins edits nothing: it has no requests."""
        self.step = None
        self.bank.begin(None, 0)

    def enter(self) -> None:
        """From now on, `running` in this thread is this state."""
        self._running.state = self

    @classmethod
    def running(cls) -> "ReftState":
        """The state whose model runs in this thread."""
        return cls._running.state

    def edit(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the states behind a block in place.

        Args:
            layer: the block, -1 for what enters the first.
            hidden, residual: `[..., d]`, see `Bank.edit`.
        """
        places = self.bank.behind.get(layer)
        if not places or not self.bank.active:
            return
        hidden = hidden.view(-1, hidden.shape[-1])
        residual = None if residual is None else residual.view(-1, residual.shape[-1])
        for place in places:
            self.bank.edit(place, hidden, residual)

    def edit_part(self, layer: int, part: str, read: Tensor, written: Tensor) -> None:
        """Edit in place what a linear layer of a block wrote, `[..., d]`, by what it read, `[..., k]`."""
        bank, step = self.bank, self.step
        if step is None or isinstance(bank, FixedBank) or not (places := bank.inside.get((layer, part))):
            return
        for place in places:
            bank.edit_in(step, place, written.view(-1, written.shape[-1]), read=read.view(-1, read.shape[-1]))
