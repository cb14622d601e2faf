"""Learning rates and schedules for LoRA of rank 1 at the last 16 tokens, on the short tasks of the study.

    python benchmarks/schedules.py [--seeds 3]
    python benchmarks/schedules.py --heldout [--tasks emoji middle ...] [--steps 80] [--seeds 6]

Scores are of the validation examples; `--heldout` scores on the others what these chose, and what a `Trainer` has by
default. A row is printed when it is there, and replaces that of the same task, schedule, steps and seed in `results/`.
"""

import argparse
import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from _common import keep
from _study.settings import FULL, Setting
from _study.tasks import TASKS, load_task
from _study.training import Run
from pyreft import ReftConfig, get_reft_model


@dataclass(frozen=True)
class Schedule:
    """How the edits are trained.

    Args:
        lr: the learning rate at its highest.
        beta1: Adam's momentum.
        falls: whether it falls to zero in a line, as a `Trainer` has it by default.
        warmup: the share of the steps in which it rises from zero.
        clip: the most that the gradient's norm may be, as the 1 of a `Trainer`; none clips nothing.
        of_b: how many times the rate of A that of B is, as in LoRA+ (arXiv 2402.12354).
        alpha: α/r, as the rank is 1.
        dropout: on the edit.
        steps: how many there are.
    """

    lr: float
    beta1: float = 0.9
    falls: bool = False
    warmup: float = 0.0
    clip: float | None = None
    of_b: float = 1.0
    alpha: float = 2.0
    dropout: float = 0.0
    steps: int = FULL.marks[-1]

    def factor(self, step: int) -> float:
        """What the rate is multiplied with in a step."""
        rising = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        return rising * ((self.steps - step) / self.steps if self.falls else 1.0)


DEFAULT = Schedule(8e-3, clip=1, dropout=0.3)  # of `pyreft train`
LESS_MOMENTUM = replace(DEFAULT, lr=1.2e-2, beta1=0.5)
COMPARED = (DEFAULT, LESS_MOMENTUM, *(replace(DEFAULT, lr=lr, falls=True) for lr in (8e-3, 1.2e-2, 1.6e-2)))
SCHEDULES = (
    *(Schedule(lr) for lr in (3e-3, 8e-3)),
    *(Schedule(lr, falls=True) for lr in (3e-3, 5e-3, 8e-3, 1.2e-2, 2e-2)),
    Schedule(8e-3, falls=True, warmup=0.1),
    *(Schedule(lr, falls=True, of_b=of_b) for lr, of_b in ((4e-3, 4), (2e-3, 8))),
    Schedule(3e-3, falls=True, alpha=8),
    *(Schedule(lr, clip=1) for lr in (8e-3, 1.2e-2)),
    *(Schedule(lr, falls=True, clip=1) for lr in (1.2e-2, 2e-2)),
    *(Schedule(lr, falls=True, clip=1, warmup=0.1) for lr in (2e-2, 3e-2)),
    Schedule(5e-3, falls=True, clip=1, of_b=4),
    *(replace(DEFAULT, lr=lr, beta1=beta1) for lr in (8e-3, 1.2e-2, 1.6e-2) for beta1 in (0.9, 0.7, 0.5, 0.3)),
)


@dataclass(frozen=True)
class Scaled(Setting):
    """LoRA of rank 1 at `l16` with a scale of its own."""

    alpha: float = 2.0

    def adapt(self, model: Any) -> Any:
        kwargs = {"alpha": self.alpha}
        chosen = {"positions": "l16", "low_rank_dimension": 1, "dropout": self.dropout}
        config = ReftConfig(intervention="lora", intervention_kwargs=kwargs, **chosen)
        return get_reft_model(model, config)


def train(task: str, schedule: Schedule, seed: int) -> Run:
    """The trained adapter of a task."""
    setting = Scaled("located LoRA", 1, "l16", alpha=schedule.alpha, dropout=schedule.dropout)
    run = Run(setting, FULL, load_task(task).train, schedule.lr, seed, clip=schedule.clip)
    named = [(name, parameter) for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if (".B." in name) == second], "lr": schedule.lr * times}
        for second, times in ((False, 1.0), (True, schedule.of_b))
    ]
    run.optimizer = torch.optim.AdamW(groups, betas=(schedule.beta1, 0.999), weight_decay=0.0)
    falling = LambdaLR(run.optimizer, schedule.factor)
    run.optimizer.register_step_post_hook(lambda *_: falling.step())
    run.train(schedule.steps)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", action="store_true", help="score what was chosen, on held-out examples")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["emoji", "middle"])
    parser.add_argument("--steps", type=int, default=FULL.marks[-1])
    given = parser.parse_args()
    torch.set_num_threads(1)
    split, first = ("heldout", 0) if given.heldout else ("validation", 1000)
    schedules = [replace(one, steps=given.steps) for one in (COMPARED if given.heldout else SCHEDULES)]
    for task, schedule, seed in itertools.product(given.tasks, schedules, range(first, first + given.seeds)):
        run = train(task, schedule, seed)
        score = run.score(getattr(load_task(task), split)[: FULL.heldout])
        which = {"task": task, **asdict(schedule), "seed": seed}
        row = {**which, "score": score, "seconds": run.seconds}
        keep(f"schedules_{split}", row, by=tuple(which))


if __name__ == "__main__":
    main()
