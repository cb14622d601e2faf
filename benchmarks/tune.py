"""An untuned user beside a tuned one, on tasks of the study: held-out answers that neither training nor tuning saw.

    python benchmarks/tune.py

Both have the same examples. The untuned user trains on all of them with the default settings. The tuned one lets
`pyreft tune` hold out a part of them to choose by; what is trained then on the rest is scored, and what `best.yaml`
trains on all of them. Seconds are processor time, on one thread.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option, run

import pyreft
from _common import report
from _study.tasks import load_task
from pyreft.files.text import read_yaml
from pyreft.jobs.held_out import evaluate_file
from pyreft.jobs.job import PreparedJob
from pyreft.jobs.settings import TrainingJob
from pyreft_cli.console import hush

TASKS = ("emoji", "middle", "emoji-long")
_BATCH = 50
_ANSWER = 16  # tokens


def write(path: Path, pairs: Any) -> str:
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def score(adapter: Path, heldout: str) -> dict[str, float]:
    found = evaluate_file(adapter, heldout, batch_size=_BATCH, max_new_tokens=_ANSWER)
    return {"right": 100 * found["exact"], "loss": found["loss"]}


def train(job: TrainingJob, heldout: str) -> dict[str, Any]:
    prepared, begin = PreparedJob(job), time.process_time()
    done = prepared.train()
    costs = {"parameters": done["parameters"], "seconds": time.process_time() - begin}
    return costs | score(Path(job.output), heldout)


def compare(task: str, limits: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of one task and seed: untuned, tuned, and the tuned settings on all examples."""
    data = load_task(task)
    examples = write(folder / "examples.jsonl", (*data.train, *data.validation))
    heldout = write(folder / "heldout.jsonl", data.heldout)
    common = {"data": examples, "format": "text", "seed": seed}
    untuned = train(TrainingJob(output=str(folder / "untuned"), **common), heldout)
    begin = time.process_time()
    found = pyreft.tune(examples, folder / "tuned", seed=seed, **limits, settings={"format": "text"})
    tuning = time.process_time() - begin
    tuned = {"parameters": found.best.parameters} | score(found.adapter, heldout)
    whole = read_yaml(found.settings) | {"output": str(folder / "whole"), "validation_split": 0.0}
    again = train(TrainingJob.from_settings(whole, "tune"), heldout)
    over = [record for record in found.trials if record.state in ("done", "pruned", "diverged")]
    what = {
        "settings": f"{found.best.name}, lr {found.best.settings['lr']:.2g}, {found.best.settings['epochs']} epochs"
    }
    what |= {"trainings": len(over), "tuning": tuning}
    return [
        {"task": task, "seed": seed, "who": who, **figures, **(what if who != "untuned" else {})}
        for who, figures in (("untuned", untuned), ("tuned", tuned), ("tuned, on all", again))
    ]


def main(
    minutes: Annotated[float, Option(help="Of each tuning.")] = 3.0,
    trials: Annotated[int | None, Option(help="Instead: how many trainings it has.")] = None,
    tasks: Annotated[str, Option(help="Which tasks of the study, separated by ';'.")] = ";".join(TASKS),
    seeds: Annotated[int, Option(help="How many seeds for each task.")] = 1,
    keep: Annotated[bool, Option(help="Write results/tune.json.")] = True,
) -> None:
    hush()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    limits = {"minutes": minutes} if trials is None else {"trials": trials}
    for task in tasks.split(";"):
        for seed in range(seeds):
            folder = Path(tempfile.mkdtemp())
            try:
                rows += compare(task, limits, seed, folder)
            finally:
                shutil.rmtree(folder)
            report("tune", rows, keep=keep)  # what there is so far


if __name__ == "__main__":
    run(main)
