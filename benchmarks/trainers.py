"""A step of TRL's trainers: edits of which only the reachable part is computed, whole rows of the same, and LoRA.

python benchmarks/trainers.py
"""

import random
import statistics
import tempfile
import time
from typing import Any

import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

import pyreft
from _common import report
from _steps import BATCH, MAIN, RANK, llama
from pyreft import pocket
from pyreft.reach import ReachCallback

PROMPT, ANSWER = 112, 16  # words, each of one token
ROUNDS, STEPS = 2, 3
LORA = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Timer(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.begin)


def texts(kind: str, tokenizer: Any) -> Dataset:
    draw = random.Random(0)
    words = [word for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha()]

    def text(count: int) -> str:
        return tokenizer.convert_tokens_to_string(draw.choices(words, k=count))

    rows = [{"prompt": text(PROMPT), "chosen": text(ANSWER), "rejected": text(ANSWER)} for _ in range(BATCH)]
    if kind == "SFT":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return Dataset.from_list(rows)


def trainer_of(kind: str, config: Any, tokenizer: Any, directory: str) -> Any:
    options = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "report_to": "none", "use_cpu": True}
    options |= {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True}
    options |= {"precompute_ref_log_probs": True} if kind == "DPO" else {}
    return getattr(trl, f"{kind}Trainer")(
        model=llama(MAIN),
        processing_class=tokenizer,
        args=getattr(trl, f"{kind}Config")(directory, **options),
        train_dataset=texts(kind, tokenizer),
        peft_config=config,
        callbacks=[Timer()],
    )


def compare(kind: str, layers: Any, positions: str, directory: str) -> list[dict]:
    tokenizer = pocket.load()[1]
    edits = pyreft.ReftConfig(
        layers=layers, positions=positions, low_rank_dimension=RANK, task_type="CAUSAL_LM", intervention="loreft"
    )
    trainers = {name: trainer_of(kind, LORA, tokenizer, directory) for name in ("LoRA r8 q,v",)}
    trainers |= {name: trainer_of(kind, edits, tokenizer, directory) for name in ("whole rows", "in part")}
    trainers["in part"].add_callback(ReachCallback(trainers["in part"].model))
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS):
        for name, trainer in trainers.items():
            timer = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Timer))
            timer.times.clear()
            trainer.train()
            times[name].append(statistics.median(timer.times[1:]))  # the first runs the prefixes
    lora, whole = (times[name] for name in ("LoRA r8 q,v", "whole rows"))
    return [
        {
            "trainer": kind,
            "prompt + answer": f"{PROMPT} + {ANSWER}",
            "edits": "all layers" if layers == "all" else f"layer {layers[0]}",
            "positions": positions,
            "method": name,
            "step (ms)": 1e3 * statistics.median(taken),
            "LoRA / step": statistics.median(a / b for a, b in zip(lora, taken, strict=True)),
            "whole / step": statistics.median(a / b for a, b in zip(whole, taken, strict=True)),
            "trl": trl.__version__,
        }
        for name, taken in times.items()
    ]


if __name__ == "__main__":
    places: list[tuple[Any, str]] = [("all", "l1")]
    with tempfile.TemporaryDirectory() as directory:
        report("trainers", [row for kind in ("SFT", "DPO") for at in places for row in compare(kind, *at, directory)])
