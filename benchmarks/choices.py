"""What learns better, one change at a time, around LoRA of rank 1 on v and o at the last 16 tokens without dropout.

    python benchmarks/choices.py [--tasks emoji middle] [--only "l64" "the last 4"] [--seeds 3] [--lrs 3e-3 8e-3]
    python benchmarks/choices.py --tasks desk order --only "l16+a4" --lrs 8e-3    on SmolLM2-135M-Instruct

Of the learning rates the one with the best validation score over the seeds is taken, of equals the smallest. An answer
counts if it is exactly what greedy decoding gives, which is read off one forward over prompt and answer. A row is
printed when it is there, and replaces that of the same name in `results/choices.json`.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from _common import keep
from _study.messages import load_messages
from _study.settings import FULL
from _study.tasks import TASKS, Pair, Task, load_task
from _study.training import Run
from pyreft import ReftConfig, get_reft_model, pocket, smollm2
from pyreft.positions import IGNORED

V_O = ("value_output", "attention_output")
BLOCKS = {"intervention": "loreft", "component": "block_output", "low_rank_dimension": 2}


@dataclass(frozen=True)
class Choice:
    """An adapter that differs from LoRA of rank 1 on v and o at the last 16 tokens in one thing.

    Args:
        about: what it is that differs.
        name: how.
        config: of `ReftConfig`, beside that.
        answer: how many of the answer's first tokens are edited, too.
        weight_decay: of AdamW.
    """

    about: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    answer: int = 0
    weight_decay: float = 0.0
    method = "ReFT"

    def adapt(self, model: Any) -> Any:
        """Put the untrained adapter on a model."""
        default = {"intervention": "lora", "component": list(V_O), "low_rank_dimension": 1, "positions": "l16"}
        return get_reft_model(model, ReftConfig(**default | self.config))


def at(*components: str, rank: int = 1) -> dict[str, Any]:
    """LoRA at some linear layers of each block."""
    return {"component": list(components), "low_rank_dimension": rank}


CHOICES = (
    Choice("", "no dropout"),
    Choice("places", "q, v", at("query_output", "value_output")),
    Choice("places", "o, down", at("attention_output", "down_output")),
    Choice("places", "v", at("value_output", rank=2)),
    Choice("places", "o", at("attention_output", rank=2)),
    Choice("places", "q, k, v, o", at("query_output", "key_output", *V_O)),
    Choice(
        "places",
        "all linear",
        at("query_output", "key_output", *V_O, "gate_output", "up_output", "down_output"),
    ),
    Choice("layers of 7", "the first 4", {"layers": [0, 1, 2, 3]}),
    Choice("layers of 7", "the last 4", {"layers": [3, 4, 5, 6]}),
    Choice("layers of 7", "the middle one, rank 7", {"layers": [3], "low_rank_dimension": 7}),
    *(Choice("tokens", rule, {"positions": rule}) for rule in ("l1", "l4", "l64", "f7+l7", "prompt", "all")),
    *(Choice("tokens", f"l16+a{n}", answer=n) for n in (1, 4, 64)),
    Choice("rank and tokens", "rank 2, l4", {"low_rank_dimension": 2, "positions": "l4"}),
    Choice("rank and tokens", "rank 2, l16", {"low_rank_dimension": 2}),
    Choice("rank and tokens", "rank 4, l4", {"low_rank_dimension": 4, "positions": "l4"}),
    Choice("rank and tokens", "rank 4, l16", {"low_rank_dimension": 4}),
    Choice("formula of blocks, rank 2", "LoReFT, from random", BLOCKS),
    Choice("formula of blocks, rank 2", "LoReFT, from h' = h", BLOCKS | {"init_weights": True}),
    Choice("formula of blocks, rank 2", "NoReFT, from random", BLOCKS | {"intervention": "noreft"}),
    Choice(
        "formula of blocks, rank 2", "NoReFT, from h' = h", BLOCKS | {"intervention": "noreft", "init_weights": True}
    ),
    Choice("formula of blocks, rank 2", "DiReFT, from random", BLOCKS | {"intervention": "nodireft"}),
    Choice(
        "formula of blocks, rank 2", "DiReFT, from h' = h", BLOCKS | {"intervention": "nodireft", "init_weights": True}
    ),
    *(Choice("dropout on the edit", f"dropout {p}", {"dropout": p}) for p in (0.1, 0.3)),  # 0.3 is the default
    *(Choice("weight decay", f"weight decay {decay}", weight_decay=decay) for decay in (0.01, 0.1, 1.0)),
)


class Trained(Run):
    """A choice in training."""

    def __init__(self, choice: Choice, *args: Any, **kwargs: Any) -> None:
        super().__init__(choice, *args, **kwargs)  # type: ignore[arg-type]
        self.optimizer.param_groups[0]["weight_decay"] = choice.weight_decay
        self.answer, self.places = choice.answer, len(self.model.interventions)
        self._batches = map(self.given, self._batches)

    def given(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A batch with the tokens to edit, where the rule does not say it: the last 16 of the prompt and some more."""
        if not self.answer:
            return batch
        rows = []
        for mask, labels in zip(batch["attention_mask"], batch["labels"], strict=True):
            begin = int((labels != IGNORED).nonzero()[0])
            chosen = range(max(begin - 16, 0), min(begin + self.answer, int(mask.sum())))
            rows.append([*chosen, *[-1] * (16 + self.answer - len(chosen))])
        return {**batch, "intervention_locations": torch.tensor(rows)[:, None].expand(-1, self.places, -1)}

    @torch.no_grad()
    def right(self, pairs: Sequence[Pair]) -> float:
        """The share of answers that greedy decoding would give."""
        self.model.eval()
        found = 0
        for batch in self.in_order(pairs):
            logits = self.model(**self.given(batch)).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            found += int(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1).sum())
        return found / len(pairs)

    def in_order(self, pairs: Sequence[Pair], size: int = 25) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of pairs, in which none is left out or comes twice."""
        rows = self._encode(pairs)
        for start in range(0, len(rows), size):
            yield self._batch(rows[start : start + size])


def load(task: str) -> tuple[Task, Callable[[], tuple[Any, Any]], int]:
    """A task, the model that learns it, and the steps of a training."""
    if task in TASKS:
        return load_task(task), pocket.load, FULL.marks[-1]
    return load_messages(task, smollm2.load()[1]), smollm2.load, 75


def measure(choice: Choice, name: str, lrs: Sequence[float], seeds: int) -> dict[str, Any]:
    """A row: held-out answers right, and seconds of the steps, of each seed at the rate that suits a task best."""
    task, model, steps = load(name)
    found: dict[float, list[tuple[float, float, float]]] = {}
    for lr in sorted(lrs):
        for seed in range(seeds):
            run = Trained(choice, FULL, task.train, lr, seed, load=model)
            run.train(steps)
            scores = (100 * run.right(pairs) for pairs in (task.validation, task.heldout[:200]))
            found.setdefault(lr, []).append((*scores, run.seconds))
    validation = {lr: statistics.mean(one[0] for one in of_rate) for lr, of_rate in found.items()}
    lr = max(validation, key=validation.__getitem__)
    _, right, seconds = (list(column) for column in zip(*found[lr], strict=True))
    what = {"task": name, "about": choice.about, "choice": choice.name, "parameters": run.parameters, "lr": lr}
    return {**what, "validation": validation, "right": right, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["emoji", "middle"], choices=[*TASKS, "desk", "tone", "order"])
    parser.add_argument("--only", nargs="+", help="names of choices, as in the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 8e-3])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for choice in CHOICES:
        if given.only and choice.name not in given.only:
            continue
        for name in given.tasks:
            row = measure(choice, name, given.lrs, given.seeds)
            keep("choices", row, by=("task", "choice"))


if __name__ == "__main__":
    main()
