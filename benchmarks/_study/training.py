"""One adapter on one task: a learning rate chosen, then trained and scored for each seed, on one thread."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import set_seed

from pyreft import pocket
from pyreft.generation import generate_answers
from pyreft.positions import IGNORED
from pyreft.reach import Reach

from .settings import Plan, Setting
from .tasks import Pair, Task, load_task

Row = dict[str, Any]
_TUNING_SEED = 1000


def run_cell(setting: Setting, tasks: Sequence[str], plan: Plan) -> list[Row]:
    """Return a row for each task and seed: what was trained, and the held-out score after so many steps and seconds.

    Seconds are those of the process on one thread, of steps alone. Of several learning rates the one with the best
    validation score on the short form of the tasks is taken, of equals the smallest.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lr, tried = _choose_lr(setting, load_task(tasks[0].removesuffix("-long")), plan)
        common = {"name": setting.name, **asdict(setting), "lr": lr, "validation": tried}
        return [
            {"task": task, **common, **_curve(setting, load_task(task), plan, lr, seed)}
            for task in tasks
            for seed in range(plan.seeds)
        ]
    finally:
        torch.set_num_threads(threads)


def _choose_lr(setting: Setting, data: Task, plan: Plan) -> tuple[float, dict[str, float]]:
    """The learning rate to take, and the validation score of each that was tried."""
    if len(plan.lrs) == 1:
        return plan.lrs[0], {}
    scores = {}
    for lr in sorted(plan.lrs):
        run = Run(setting, plan, data.train, lr, _TUNING_SEED)
        run.train(plan.marks[-1])
        scores[lr] = run.score(data.validation)
    return max(scores, key=lambda lr: (scores[lr], -lr)), {str(lr): score for lr, score in scores.items()}


def _curve(setting: Setting, data: Task, plan: Plan, lr: float, seed: int) -> Row:
    run = Run(setting, plan, data.train, lr, seed)
    curve = []
    for mark in plan.marks:
        run.train(mark - run.steps)
        score = run.score(data.heldout[: plan.heldout])
        curve.append({"step": mark, "seconds": run.seconds, "score": score})
    return {"parameters": run.parameters, "seed": seed, "curve": curve}


class Run:
    """An adapter in training, on the embedded model or on what `load` returns.

    Args:
        beta1: Adam's momentum.
        clip: the most that the gradient's norm may be, as the 1 of a `Trainer`; none clips nothing.
    """

    def __init__(
        self,
        setting: Setting,
        plan: Plan,
        pairs: Sequence[Pair],
        lr: float,
        seed: int,
        load: Callable[[], tuple[Any, Any]] = pocket.load,
        beta1: float = 0.9,
        clip: float | None = None,
    ) -> None:
        set_seed(seed)
        model, self.tokenizer = load()
        self.model = setting.adapt(model)
        self._call: Callable[..., Any] = self.model if setting.method == "LoRA" else Reach(self.model)
        self.clip, self._trained = clip, [one for one in self.model.parameters() if one.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in self._trained)
        self.optimizer = torch.optim.AdamW(self._trained, lr=lr, betas=(beta1, 0.999), weight_decay=0.0)
        self.steps, self.seconds = 0, 0.0
        self._batches = self._draw(self._encode(pairs), plan.batch_size, torch.Generator().manual_seed(seed))

    def _encode(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        end = [self.tokenizer.eos_token_id]
        return [
            (self.tokenizer(prompt)["input_ids"], self.tokenizer(answer, add_special_tokens=False)["input_ids"] + end)
            for prompt, answer in pairs
        ]

    def _draw(self, rows: list, size: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Batches without end; each pass over the rows has an order of its own."""
        order: list[int] = []
        while True:
            while len(order) < size:
                order += torch.randperm(len(rows), generator=generator).tolist()
            chosen, order = [rows[number] for number in order[:size]], order[size:]
            yield self._batch(chosen)

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        ids = self.tokenizer.pad({"input_ids": [p + a for p, a in rows]}, return_tensors="pt", padding_side="right")
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, IGNORED)
        for label, (prompt, _) in zip(labels, rows, strict=True):
            label[: len(prompt)] = IGNORED
        return {**ids, "labels": labels}

    def train(self, steps: int) -> None:
        self.model.train()
        begin = time.process_time()
        for _ in range(steps):
            self._call(**next(self._batches)).loss.backward()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self._trained, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.seconds += time.process_time() - begin
        self.steps += steps

    def score(self, pairs: Sequence[Pair], max_new_tokens: int = 16) -> float:
        """The share of answers that are exactly right."""
        self.model.eval()
        prompts, expected = zip(*pairs, strict=True)
        answers = generate_answers(self.model, self.tokenizer, prompts, batch_size=50, max_new_tokens=max_new_tokens)
        return sum(answer == right for answer, right in zip(answers, expected, strict=True)) / len(pairs)
