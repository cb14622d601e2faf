"""Learning rates and schedules for LoRA of rank 1 at the last 16 tokens, on the short tasks of the study.

    python benchmarks/schedules.py [--seeds 3] [--heldout]

Scores are of the validation examples; `--heldout` scores what these chose, on the others, on all four tasks. A row is
printed when it is there, and kept in `results/`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from _common import machine
from _study.settings import FULL, Setting
from _study.tasks import TASKS, load_task
from _study.training import Run
from pyreft import ReftConfig, get_reft_model

STEPS = FULL.marks[-1]


@dataclass(frozen=True)
class Schedule:
    """How the edits are trained.

    Args:
        lr: the learning rate at its highest.
        falls: whether it falls to zero in a line, as a `Trainer` has it by default.
        warmup: the share of the steps in which it rises from zero.
        clip: the most that the gradient's norm may be, as the 1 of a `Trainer`; none clips nothing.
        of_b: how many times the rate of A that of B is, as in LoRA+ (arXiv 2402.12354).
        alpha: α/r, as the rank is 1.
    """

    lr: float
    falls: bool = False
    warmup: float = 0.0
    clip: float | None = None
    of_b: float = 1.0
    alpha: float = 2.0

    def factor(self, step: int) -> float:
        """What the rate is multiplied with in a step."""
        rising = min(1.0, (step + 1) / (self.warmup * STEPS)) if self.warmup else 1.0
        return rising * ((STEPS - step) / STEPS if self.falls else 1.0)


CHOSEN = Schedule(8e-3)
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
)


@dataclass(frozen=True)
class Scaled(Setting):
    """LoRA of rank 1 at `l16` with a scale of its own."""

    alpha: float = 2.0

    def adapt(self, model: Any) -> Any:
        kwargs = {"alpha": self.alpha}
        config = ReftConfig(intervention="lora", positions="l16", low_rank_dimension=1, intervention_kwargs=kwargs)
        return get_reft_model(model, config)


def train(task: str, schedule: Schedule, seed: int) -> Run:
    """The trained adapter of a task."""
    setting = Scaled("located LoRA", 1, "l16", alpha=schedule.alpha)
    run = Run(setting, FULL, load_task(task).train, schedule.lr, seed)
    named = [(name, parameter) for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if (".B." in name) == second], "lr": schedule.lr * times}
        for second, times in ((False, 1.0), (True, schedule.of_b))
    ]
    run.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [parameter for _, parameter in named]
    run.optimizer.register_step_pre_hook(_clipping(parameters, schedule.clip))
    falling = LambdaLR(run.optimizer, schedule.factor)
    run.optimizer.register_step_post_hook(lambda *_: falling.step())
    run.train(STEPS)
    return run


def _clipping(parameters: list[torch.nn.Parameter], most: float | None) -> Callable[..., None]:
    def clip(*_: Any) -> None:
        if most is not None:
            torch.nn.utils.clip_grad_norm_(parameters, most)

    return clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", action="store_true", help="score what was chosen, on held-out examples")
    given = parser.parse_args()
    torch.set_num_threads(1)
    split, first = ("heldout", 0) if given.heldout else ("validation", 1000)
    path = Path(__file__).parent / "results" / f"schedules_{split}.json"
    rows: list[dict[str, Any]] = []
    for schedule in (CHOSEN,) if given.heldout else SCHEDULES:
        for task in TASKS if given.heldout else ("emoji", "middle"):
            for seed in range(first, first + given.seeds):
                run = train(task, schedule, seed)
                score = run.score(getattr(load_task(task), split)[: FULL.heldout])
                rows.append({"task": task, **asdict(schedule), "seed": seed, "score": score, "seconds": run.seconds})
                print(rows[-1], flush=True)
                path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
