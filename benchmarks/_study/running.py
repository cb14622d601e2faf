"""The whole study: adapters one after the other, or in processes side by side, and the file of what they reached."""

import json
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyreft.errors import ReftError

from .comparing import summary
from .settings import FULL, Plan, Setting
from .tasks import read_tasks
from .training import Row, run_cell

_Cell = tuple[Setting, list[str], Plan]


def run_study(
    output: str | Path,
    *,
    plan: Plan = FULL,
    tasks: str | list[str] = "all",
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train and score every adapter of a plan; `study.json` in `output` has the rows so far at any time.

    Args:
        output: a directory, made if it is not there.
        plan: what is trained, and how.
        tasks: names of `tasks.TASKS`, or `"all"`.
        jobs: how many processes share the work, of one thread each.
        progress: called with how many adapters are done, of how many.

    Returns:
        What the file holds: `rows`, what `comparing.summary` makes of them, the plan and the versions.

    Raises:
        ReftError: an unknown task, no seeds or jobs, or an output that cannot be written.
    """
    chosen = read_tasks(tasks)
    for name, number in (("seeds", plan.seeds), ("jobs", jobs)):
        if number < 1:
            raise ReftError(f"expected 1 or more, got {number}.", setting=name)
    path = check_output(output) / "study.json"
    cells = [(setting, forms, plan) for setting, forms in plan.cells(chosen)]
    found: dict[str, Any] = {"complete": False, "machine": _machine(), "plan": _described(plan), "rows": []}
    if progress is not None:
        progress(0, len(cells))
    for done, rows in enumerate(_run(cells, jobs), 1):
        found["rows"] += rows
        found |= {"complete": done == len(cells), **summary(found["rows"])}
        _write(path, found)
        if progress is not None:
            progress(done, len(cells))
    return found


def check_output(output: str | Path) -> Path:
    """Make a directory and return it.

    Raises:
        ReftError: it cannot be made or written.
    """
    directory = Path(output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".study"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ReftError(
            f"{directory} cannot be written ({error.strerror}); name another directory.", setting="output"
        ) from None
    return directory


def _run(cells: list[_Cell], jobs: int) -> Iterator[list[Row]]:
    if jobs == 1:
        yield from map(_run_one, cells)
        return
    # a fresh process each: torch's threads do not survive a fork; an interrupt is left to this one, which ends them
    with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(_run_one, cells)


def _run_one(cell: _Cell) -> list[Row]:
    return run_cell(*cell)


def _write(path: Path, found: dict[str, Any]) -> None:
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _described(plan: Plan) -> dict[str, Any]:
    names = ("seeds", "lrs", "marks", "batch_size", "heldout")
    return {name: getattr(plan, name) for name in names} | {"settings": [setting.name for setting in plan.settings]}


def _machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "pyreft")}
    return {"processor": platform.processor() or platform.machine(), "python": platform.python_version(), **packages}
