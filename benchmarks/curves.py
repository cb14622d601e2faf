"""Steps and seconds to a score: the default and LoRA of rank 8 at every token, with usual and with less momentum.

    python benchmarks/curves.py [--tasks emoji middle ...] [--seeds 3] [--adapters default ...]

On the study's tasks and held-out examples. Rates are constant and gradients clipped to a norm of 1, so that a row at a
number of steps is what a training of so many has. Seconds are processor time of the steps, on one thread. A row
replaces that of the same adapter, task and seed in `results/curves.json`.
"""

import argparse
import itertools
from dataclasses import dataclass

import torch

from _common import keep
from _study.settings import DEFAULT, FULL, Setting
from _study.tasks import TASKS, load_task
from _study.training import Run

MARKS = (20, 30, 40, 50, 60, 70, 80, 100, 120, 160)


@dataclass(frozen=True)
class Adapter:
    """An adapter, its learning rate, and the momentum of Adam, β1."""

    setting: Setting
    lr: float
    beta1: float


_LORA = Setting("LoRA", 8)
ADAPTERS = {
    "default": Adapter(DEFAULT, 8e-3, 0.9),
    "default, less momentum": Adapter(DEFAULT, 1.2e-2, 0.5),
    "LoRA": Adapter(_LORA, 2e-3, 0.9),
    "LoRA, less momentum": Adapter(_LORA, 4e-3, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for task, seed, name in itertools.product(given.tasks, range(given.seeds), given.adapters):
        adapter, data = ADAPTERS[name], load_task(task)
        run = Run(adapter.setting, FULL, data.train, adapter.lr, seed, clip=1.0, beta1=adapter.beta1)
        curve = []
        for mark in MARKS:
            run.train(mark - run.steps)
            right = 100 * run.score(data.heldout[: FULL.heldout])
            curve.append({"step": mark, "seconds": run.seconds, "right": right})
        row = {"adapter": name, "task": task, "seed": seed, "lr": adapter.lr, "beta1": adapter.beta1}
        keep("curves", {**row, "parameters": run.parameters, "curve": curve}, by=("adapter", "task", "seed"))


if __name__ == "__main__":
    main()
