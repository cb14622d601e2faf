"""What a training step costs: edits of which only the reachable part is computed, LoRA, and the floor of each.

python benchmarks/train.py [--parts main vocabulary wide located growth] [--original PYTHON]

PYTHON is the interpreter of an environment with pyreft 0.1.0, pyvene 0.1.8 and transformers 4.45.1.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _common import report
from _steps import MAIN, Edited, LoRA, Original, Sizes, batch_of, floor, in_turn, ratio_of

SHAPES: dict[str, Sizes] = {
    "main": MAIN,
    "vocabulary": {**MAIN, "vocab_size": 128_000},
    "located": MAIN,  # LoRA at some tokens
    "wide": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16, "vocab_size": 8000},
}
LENGTHS = {
    "main": [(112, 16), (248, 8)],
    "located": [(112, 16), (248, 8)],
    "vocabulary": [(112, 16)],
    "wide": [(112, 16)],
}
RUNS = {"main": 5, "located": 5, "vocabulary": 3, "wide": 1}
POSITIONS = {"main": ["l1", "l8", "f7+l7"], "vocabulary": ["l1", "l8", "f7+l7"], "wide": ["l1"]}
FROZEN = "whole rows, frozen"


def compare(shape: str, prompt: int, answer: int, original: str | None) -> list[dict]:
    """A row for each method, timed in turn with all the others."""
    sizes = SHAPES[shape]
    batch, count = batch_of(sizes["vocab_size"], prompt, answer), sizes["num_hidden_layers"]
    middle = count // 2
    places: list[tuple[Any, str, str]] = [("all", "l16", "lora")]
    if shape != "located":
        places = [([middle], "l1", "loreft"), *(("all", positions, "loreft") for positions in POSITIONS[shape])]
    names = [
        f"{'all layers' if layers == 'all' else f'layer {middle}'}, {rule}{', lora' if formula == 'lora' else ''}"
        for layers, rule, formula in places
    ]
    lora, subjects = LoRA(sizes, batch), [Edited(sizes, batch, *place) for place in places]
    steps: dict[str, Callable[[], object]] = {"LoRA": lora.step, FROZEN: floor(sizes, batch, 0, 0)}
    others: dict[str, Original] = {}
    for name, (layers, rule, _), subject in zip(names, places, subjects, strict=True):
        start = prompt - int(rule[1:]) if rule[0] == "l" else 0
        steps[name] = subject.step
        steps[f"{name}: floor"] = floor(sizes, batch, 1 if layers == "all" else middle + 1, start)
        steps[f"{name}: first"] = subject.first
        if original is not None and shape == "main":
            numbers = list(range(count)) if layers == "all" else layers
            others[name] = Original(original, sizes, prompt, answer, numbers, rule)
            steps[f"{name}: original"] = others[name].step
    times = in_turn(steps, RUNS[shape])
    most = lora.peak()
    common = {"shape": shape, "tokens": f"{prompt} + {answer}"}
    rows: list[dict] = [
        {**common, "method": "LoRA r8 q,v", "parameters": lora.parameters}
        | {"step (ms)": 1e3 * statistics.median(times["LoRA"]), "peak (MB)": most / 1e6}
    ]
    for name, subject in zip(names, subjects, strict=True):
        peak = subject.peak()
        row = {
            **common,
            "method": name,
            "parameters": subject.parameters,
            "step (ms)": 1e3 * statistics.median(times[name]),
            "LoRA / step": ratio_of(times, "LoRA", name),
            "LoRA / first step": ratio_of(times, "LoRA", f"{name}: first"),
            "step / floor": ratio_of(times, name, f"{name}: floor"),
            "step / frozen": ratio_of(times, name, FROZEN),
            "peak (MB)": peak / 1e6,
            "peak / LoRA's": peak / most,
            "held (MB)": subject.reach.store.held / 1e6,
        }
        if name in others:
            row["original / step"] = ratio_of(times, f"{name}: original", name)
            row["original's peak (MB)"] = others[name].peak() / 1e6
            row["original"] = others[name].versions
            others[name].close()
        rows.append(row)
    return rows


def growth() -> list[dict]:
    """How a step grows with the prompt, the answer and the number of edited layers, on the main shape."""
    count = MAIN["num_hidden_layers"]
    middle, top = [count // 2], list(range(count))
    cases = [("prompt", prompt, 16, prompt) for prompt in (64, 128, 256, 512, 1024, 2048, 4096)]
    cases += [("answer", 112, answer, answer) for answer in (4, 8, 16, 32, 64, 128, 256)]
    rows = []
    for what, prompt, answer, number in cases:
        batch = batch_of(MAIN["vocab_size"], prompt, answer)
        # beyond that, what LoRA keeps for its gradient does not fit into 20 GB
        steps: dict[str, Callable[[], object]] = {"LoRA": LoRA(MAIN, batch).step} if prompt <= 2048 else {}
        steps |= {
            "one layer": Edited(MAIN, batch, middle, "l1").step,
            "its floor": floor(MAIN, batch, middle[0] + 1, prompt - 1),
            "all layers": Edited(MAIN, batch, top, "l1").step,
        }
        rows.append(_growth_row(what, number, steps))
    batch = batch_of(MAIN["vocab_size"], 112, 16)
    for edited in (1, 2, 3, 4, 6, 8, 12):
        steps = {"LoRA": LoRA(MAIN, batch).step, "last layers": Edited(MAIN, batch, top[-edited:], "l1").step}
        rows.append(_growth_row("edited layers, the last ones", edited, steps))
    return rows


def _growth_row(what: str, number: int, steps: dict[str, Callable[[], object]]) -> dict:
    times = in_turn(steps, 1 if number > 512 else 3)
    row = {"grows": what, "to": number} | {f"{name} (ms)": 1e3 * statistics.median(times[name]) for name in steps}
    print(row, flush=True)
    return row


def draw(rows: list[dict], path: Path) -> None:
    """Draw how steps grow."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(12, 3.6), layout="constrained")
    colours = {
        "LoRA (ms)": "tab:orange",
        "all layers (ms)": "tab:blue",
        "one layer (ms)": "tab:green",
        "its floor (ms)": "tab:gray",
    }
    for ax, kind in zip(axes, kinds, strict=True):
        chosen = [row for row in rows if row["grows"] == kind]
        for name in [name for name in chosen[0] if name.endswith("(ms)")]:
            numbers = [row["to"] for row in chosen]
            times = [row.get(name, float("nan")) for row in chosen]
            style = "--" if "floor" in name else "o-"
            ax.plot(numbers, times, style, label=name.removesuffix(" (ms)"), color=colours.get(name, "tab:purple"))
        ax.set(xlabel=kind if "layers" in kind else f"tokens of the {kind}", yscale="log")
        if "layers" not in kind:
            ax.set_xscale("log", base=2)
            ax.set_xticks(numbers, numbers)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    axes[0].set_ylabel("training step, ms")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=[*SHAPES, "growth"], default=[*SHAPES, "growth"])
    parser.add_argument("--original", metavar="PYTHON", help="an interpreter with pyreft 0.1.0, to measure it beside")
    given = parser.parse_args()
    torch.set_num_threads(2)
    for shape in [part for part in given.parts if part in SHAPES]:
        rows = [row for lengths in LENGTHS[shape] for row in compare(shape, *lengths, given.original)]
        report(f"train_{shape}", rows)
    if "growth" in given.parts:
        rows = growth()
        report("train_growth", rows)
        draw(rows, Path(__file__).parent / "results" / "train_growth.svg")


if __name__ == "__main__":
    main()
