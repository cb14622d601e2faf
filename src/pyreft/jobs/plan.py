"""What a training will cost, by position rule, before it is started: counted from its rows, and timed on one batch.

Which tokens a step computes, `count` says; how long they take on this machine, `timing`. Nothing is trained.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

from accelerate.data_loader import SeedableRandomSampler
from torch import nn

from ..errors import ReftError
from ..places.components import number_of_layers
from ..places.structure import hidden_width
from ..positions import IGNORED, Positions
from ..reach.layers import SkipLayers
from ..reach.prefixes import SkipPrefixes
from ..tuner.adapted import edits_of
from ..tuner.registry import Edits
from .count import Count, Held, count_batches, cut_rows
from .job import PreparedJob
from .settings import LORA
from .timing import Rates, measure_step

RULES = ("l1", "l4", "l8", "l16", "f3+l3", "f7+l7", "prompt", "all")
REFERENCE = RULES[0]
_ANY = 1 << 62  # more bytes than there are


@dataclass
class Cost:
    """What a training with one rule computes and holds.

    Args:
        positions: the rule.
        edited: the tokens of a row that are edited, on average.
        tokens: of an epoch, with the padding of its batches.
        computed: those of them that each epoch computes, in the layers above the first edit, with gradients.
        largest: the most of these in one batch.
        frozen_first, frozen_later: tokens times layers that the first epoch, and the second, computes without
            gradients.
        held_bytes: of what is held of them.
        full: whether more would be held if it fitted; it is computed again in each epoch.
        step_bytes: what the largest batch keeps for its backward, as measured; none if it was not.
        peak_bytes: about what model, held tensors and the largest batch take together.
        seconds_per_step, seconds: of a step of later epochs and of the whole training; none if it was not measured.
        against: `seconds` as a multiple of those of `l1`.
    """

    positions: str
    edited: float
    tokens: int
    computed: int
    largest: int
    frozen_first: int
    frozen_later: int
    held_bytes: int
    full: bool
    step_bytes: int | None = None
    peak_bytes: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None
    against: float | None = None

    @property
    def share(self) -> float:
        """Of the tokens, the share that each epoch computes."""
        return self.computed / self.tokens


@dataclass
class Plan:
    """The costs of a training under several rules.

    Args:
        computes: what a step computes: `"windows"` behind held prefixes, whole rows above the `"layers"` below the
            edits, or whole `"rows"`.
        why_not: why whole rows, if so.
        layers, skipped: how many the model has, and how many of them lie below the first edit and are computed once.
        rows, batches, steps: how many rows are trained on, and the batches and steps of an epoch.
        epochs: see `TrainingJob`.
        budget_bytes: how much may be held.
        model_bytes: what the model takes.
        costs: by rule.
        timed: on which rows the times were measured, in words; none if they were not.
    """

    computes: str
    why_not: str | None
    layers: int
    skipped: int
    rows: int
    batches: int
    steps: int
    epochs: float
    budget_bytes: int
    model_bytes: int
    costs: list[Cost]
    timed: str | None = None

    def cost_of(self, positions: str) -> Cost:
        """The cost under one of the rules."""
        rule = Positions.parse(positions)
        return next(cost for cost in self.costs if Positions.parse(cost.positions) == rule)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def make_plan(
    prepared: PreparedJob, rules: Sequence[str] = RULES, *, most: int | None = None, timed: bool = True
) -> Plan:
    """Return what a job's training would cost under each of some rules.

    Args:
        prepared: the job.
        rules: position rules; `l1`, to compare with, and the job's own are added.
        most: look at so many rows, drawn at random, instead of all.
        timed: run a few steps on one batch, to say how long the training takes.

    Raises:
        ReftError: a rule that is none, or the job's own rule edits no token in any row; a job of LoRA.
    """
    if prepared.job.method == LORA:
        raise ReftError(
            "a plan is of representation edits, which can leave tokens out; LoRA computes them all.", setting="method"
        )
    job, edits = prepared.job, cast(Edits, edits_of(prepared.model))
    names = {Positions.parse(rule): rule for rule in (REFERENCE, *rules, job.positions)}
    rows = prepared.rows
    if most is not None and len(rows) > most:
        rows = random.Random(job.seed).sample(rows, most)
    with in_training(prepared.model):
        way, why_not = _find_way(prepared, edits)
        plan = _empty_plan(prepared, way, why_not)
        plan.costs = [_count(prepared, edits, way, rule, name, rows) for rule, name in names.items()]
        _refuse_nothing(plan, job.positions)
        if timed:
            _add_times(plan, prepared, edits, way)
    return plan


def _refuse_nothing(plan: Plan, own: str) -> None:
    if any(cost.positions == own and not cost.edited for cost in plan.costs):
        raise ReftError(
            f"the rule {own!r} finds no token to edit in any of {plan.rows} prompts, which may be too short "
            "for it; nothing could be learned. Choose another rule, such as 'l1'.",
            setting="positions",
        )


def _empty_plan(prepared: PreparedJob, way: SkipPrefixes | SkipLayers | None, why_not: str | None) -> Plan:
    job, base = prepared.job, prepared.model.get_base_model()
    batches = math.ceil(len(prepared.rows) / job.batch_size)
    return Plan(
        computes="rows" if way is None else "windows" if isinstance(way, SkipPrefixes) else "layers",
        why_not=why_not,
        layers=number_of_layers(base),
        skipped=0 if way is None else way.kept,
        rows=len(prepared.rows),
        batches=batches,
        steps=math.ceil(batches / job.gradient_accumulation),
        epochs=job.epochs,
        budget_bytes=prepared.reach.store.budget if prepared.reach else 0,
        model_bytes=sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers())),
        costs=[],
    )


def _find_way(prepared: PreparedJob, edits: Edits) -> tuple[SkipPrefixes | SkipLayers | None, str | None]:
    """How the steps are computed: the model is probed on a few tokens of its longest prompt."""
    if prepared.reach is None:
        return None, "to compute only what the edits can reach is turned off (reach: false)"
    longest = max(prepared.rows, key=lambda row: row["labels"].count(IGNORED))
    with following(edits, Positions.parse(REFERENCE)):
        way = prepared.reach.find_way(**collate(prepared, [longest]))
    return way, prepared.reach.why_not


def _count(
    prepared: PreparedJob,
    edits: Edits,
    way: SkipPrefixes | SkipLayers | None,
    rule: Positions,
    name: str,
    rows: Sequence[dict[str, Any]],
) -> Cost:
    """Count the first two epochs under a rule; those that follow are like the second."""
    job = prepared.job
    with following(edits, rule):
        cuts, held_out = cut_rows(edits, rows), cut_rows(edits, prepared.validation)
    held = Held(prepared.reach.store.budget if prepared.reach else 0, spills=job.reach_directory is not None)
    fixed = held, _width(prepared)
    epochs: list[Count] = []
    for epoch in (0, 1):
        order = batches_of(len(cuts), job.batch_size, job.seed + epoch)
        epochs.append(count_batches(way, [[cuts[row] for row in batch] for batch in order], *fixed))
        count_batches(way, [held_out[n : n + job.batch_size] for n in range(0, len(held_out), job.batch_size)], *fixed)
    first, later = epochs
    return Cost(
        positions=name,
        edited=sum(row.edited for row in cuts) / len(cuts),
        tokens=first.tokens,
        computed=first.computed,
        largest=max(first.largest, later.largest),
        frozen_first=first.frozen,
        frozen_later=later.frozen,
        held_bytes=held.bytes,
        full=held.full,
    )


def _add_times(plan: Plan, prepared: PreparedJob, edits: Edits, way: SkipPrefixes | SkipLayers | None) -> None:
    """Measure the rules that compute the fewest and the most tokens on one batch, and read off all others."""
    rows = _middle_batch(prepared)
    fewest, largest = (choose(plan.costs, key=lambda cost: cost.computed) for choose in (min, max))
    measured, counts = [], []
    for cost in (fewest, largest):
        with following(edits, Positions.parse(cost.positions)):
            measured.append(measure_step(prepared.model, prepared.reach if way else None, collate(prepared, rows)))
            counts.append(count_batches(way, [cut_rows(edits, rows)], Held(_ANY), _width(prepared)))
    rates = Rates(measured[0], measured[1], (counts[0].computed, counts[1].computed), counts[0].frozen)
    on_cpu = prepared.model.get_device().type == "cpu"  # where what is held lies beside the model
    for cost in plan.costs:
        first = rates.seconds(plan.batches, cost.computed, cost.frozen_first)
        later = rates.seconds(plan.batches, cost.computed, cost.frozen_later)
        cost.seconds = first * min(plan.epochs, 1) + later * max(plan.epochs - 1, 0)
        cost.seconds_per_step = later / plan.steps
        cost.step_bytes = rates.kept(cost.largest)
        cost.peak_bytes = plan.model_bytes + cost.step_bytes + (cost.held_bytes if on_cpu else 0)
    reference = plan.cost_of(REFERENCE).seconds or 0
    for cost in plan.costs:
        cost.against = cost.seconds / reference if reference and cost.seconds else None
    plan.timed = f"{len(rows)} rows of {min(_lengths(rows))} to {max(_lengths(rows))} tokens"


def _middle_batch(prepared: PreparedJob) -> list[dict[str, Any]]:
    """The batch of the first epoch whose rows are neither the longest nor the shortest."""
    job = prepared.job
    batches = [
        [prepared.rows[row] for row in batch] for batch in batches_of(len(prepared.rows), job.batch_size, job.seed)
    ]
    whole = [batch for batch in batches if len(batch) == len(batches[0])]
    return sorted(whole, key=lambda batch: max(_lengths(batch)))[len(whole) // 2]


def _lengths(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [len(row["input_ids"]) for row in rows]


def _width(prepared: PreparedJob) -> int:
    """How many bytes a token's state takes between two layers."""
    base = prepared.model.get_base_model()
    return hidden_width(base) * base.dtype.itemsize


def batches_of(rows: int, size: int, seed: int) -> list[list[int]]:
    """The numbers of the rows of each batch of an epoch, in the order that the Trainer draws."""
    order = list(SeedableRandomSampler(range(rows), data_seed=seed))
    return [order[begin : begin + size] for begin in range(0, rows, size)]


def collate(prepared: PreparedJob, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows, where the model is."""
    batch = prepared.collator(list(rows))
    return {name: value.to(prepared.model.get_device()) for name, value in batch.items()}


@contextmanager
def following(edits: Edits, rule: Positions) -> Iterator[None]:
    """Let all edits of a model follow another rule."""
    before = edits.rules
    edits.rules = {name: [rule] * len(own) for name, own in before.items()}
    try:
        yield
    finally:
        edits.rules = before


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """A model in training mode, each of its modules afterwards in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
