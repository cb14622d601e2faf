"""How long steps take on this machine: two of them are measured on one batch, and all others are read off.

Knows a model and a batch, nothing of rules: what lies between the two is taken to be in proportion to its tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import ReftModel
from ..reach import Reach
from ..tuner.adapted import penalty

_REPEATED = 3


@dataclass(frozen=True)
class Measured:
    """A step over one batch: forward, backward, and an optimiser that changes nothing.

    Args:
        first, later: seconds, where nothing and where everything that can be held is held.
        kept: how many bytes the forward keeps for the backward.
    """

    first: float
    later: float
    kept: int


def measure_step(model: ReftModel, reach: Reach | None, batch: dict[str, Any]) -> Measured:
    """Measure a step; what is held is forgotten first."""
    optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=0.0, weight_decay=0.0)

    def step() -> float:
        _finish(batch)
        begin = time.perf_counter()
        with nullcontext() if reach is None else reach.serving(losses=True):
            loss = model(**batch).loss
        extra = penalty(model)
        (loss if extra is None else loss + extra.to(loss.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        _finish(batch)
        return time.perf_counter() - begin

    def forget() -> None:
        if reach is not None:
            reach.store.clear()

    kept = _Kept(model)
    with _holding_all(reach):
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            step()  # also for whatever is set up once
        firsts = []
        for _ in range(2):
            forget()
            firsts.append(step())
        later = min(step() for _ in range(_REPEATED))
        forget()
    return Measured(min(firsts), later, kept.bytes)


@contextmanager
def _holding_all(reach: Reach | None) -> Iterator[None]:
    """Hold all of a batch, even where the whole training would not fit."""
    if reach is None:
        yield
        return
    budget, reach.store.budget = reach.store.budget, 1 << 62
    reach.store.clear()
    try:
        yield
    finally:
        reach.store.budget = budget


class _Kept:
    """Counts the memory of tensors that are saved for a backward, but for the model's own."""

    def __init__(self, model: ReftModel) -> None:
        self.bytes = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Rates:
    """What the steps of a training take, read off from the smallest and the largest one.

    Args:
        least, most: measured steps, of the rules that compute the fewest and the most tokens.
        tokens: how many these computed, with gradients.
        frozen: tokens times layers that the smallest one computed once, without gradients.
    """

    least: Measured
    most: Measured
    tokens: tuple[int, int]
    frozen: int

    def seconds(self, batches: int, computed: int, frozen: int) -> float:
        """The time of so many batches, with these tokens and tokens times layers among them."""
        slope = self._slope(self.least.later, self.most.later)
        alone = max(0.0, self.least.later - slope * self.tokens[0])
        once = max(0.0, self.least.first - self.least.later) / max(1, self.frozen)
        return batches * alone + slope * computed + once * frozen

    def kept(self, computed: int) -> int:
        """How many bytes a batch keeps for its backward."""
        slope = self._slope(self.least.kept, self.most.kept)
        return max(0, round(self.least.kept + slope * (computed - self.tokens[0])))

    def _slope(self, least: float, most: float) -> float:
        if self.tokens[0] == self.tokens[1]:
            return least / max(1, self.tokens[0])
        return max(0.0, most - least) / (self.tokens[1] - self.tokens[0])


def _finish(batch: dict[str, Any]) -> None:
    """Wait for what a device still computes."""
    device = batch["input_ids"].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
