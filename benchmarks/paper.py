"""The paper's tables: a suite's recipe trained for each method and seed, scored, and recorded beside the paper's row.

    python benchmarks/paper.py commonsense --model huggyllama/llama-7b --data-dir LLM-Adapters --work runs

It needs a GPU, the model and the data; what was trained is kept in `--work`, and a run that is cut off goes on with
what is missing. The record is results/paper-<suite>.json: each seed's row, the means and the standard deviations.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from _common import machine
from pyreft.files.record import FILE
from pyreft.jobs.evaluate import columns, evaluate
from pyreft.jobs.output import CHECKPOINTS
from pyreft.jobs.prepare import prepare
from pyreft.jobs.recipes import recipe_jobs
from pyreft.tasks.glue import TASKS
from pyreft.tasks.suites import GLUE, SUITES
from pyreft.training.checkpointing import last_complete

SEEDS = {GLUE: [42, 43, 44, 45, 46]}  # the paper's; of the other suites three


def run(suite: str, method: str, seed: int, given: dict[str, Any], work: Path, options: dict[str, Any]) -> dict:
    """Train what is not there yet and score it."""
    place = work / f"{suite}-{method}-{seed}"
    tasks = options.get("tasks") or list(TASKS) if suite == GLUE else [None]
    trained = {}
    for task in tasks:
        output = place / task if task else place
        settings = given | {"method": method, "seed": seed, "output": str(output)} | ({"task": task} if task else {})
        (job,) = recipe_jobs(suite, settings)
        if not (output / FILE).is_file():
            job.resume = last_complete(output / CHECKPOINTS) is not None
            trained[task or suite] = prepare(job).train()
    answers = work / "answers" / place.name
    row = evaluate(place, suite, given.get("data_dir"), seed=seed, output=answers, **options)
    return {"seed": seed, "trained": trained, **row}


def summary(suite: str, rows: list[dict]) -> list[dict]:
    """The mean and the standard deviation over the seeds, for each method, and the paper's score."""
    means = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        for task in columns(suite):
            scores = [row["tasks"][task]["score"] for row in own if task in row["tasks"]]
            if scores and None not in scores:
                spread = statistics.stdev(scores) if len(scores) > 1 else None
                paper = own[0]["tasks"][task]["paper"]
                means.append(
                    {"method": method, "task": task, "mean": statistics.mean(scores), "sd": spread, "paper": paper}
                )
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--model")
    parser.add_argument("--data-dir")
    parser.add_argument("--work", type=Path, required=True, help="where the adapters and the answers go")
    parser.add_argument("--methods", nargs="+", default=["loreft", "direft", "lora"])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--tasks", nargs="*", default=[], help="some of the suite's tasks")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings that win over the recipe's"
    )
    parser.add_argument("--decoding", type=json.loads, help="arguments of generate as JSON, instead of the recipe's")
    parser.add_argument("--record", type=Path, help="the record, if not results/paper-<suite>.json")
    asked = parser.parse_args()
    given = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in asked.set)}
    given |= {"model": asked.model, "data_dir": asked.data_dir}
    options = {"tasks": asked.tasks, "limit": asked.limit, "decoding": asked.decoding}
    record = asked.record or Path(__file__).parent / "results" / f"paper-{asked.suite}.json"
    rows = []
    for method in asked.methods:
        for seed in asked.seeds or SEEDS.get(asked.suite, [42, 43, 44]):
            rows.append(run(asked.suite, method, seed, given, asked.work, options))
            means = summary(asked.suite, rows)
            changed = {"set": asked.set, "decoding": asked.decoding, "limit": asked.limit}
            text = json.dumps({"machine": machine(), "changed": changed, "means": means, "rows": rows}, indent=1)
            record.parent.mkdir(exist_ok=True, parents=True)
            record.write_text(text + "\n")
    for mean in means:
        shown = "" if mean["sd"] is None else f" ± {mean['sd']:.2f}"
        print(f"{mean['method']:8} {mean['task']:14} {mean['mean']:6.2f}{shown}  paper {mean['paper']}")


if __name__ == "__main__":
    main()
