"""Small adapters of the embedded model beside each other: which method, rank and tokens reach what at what cost.

    python benchmarks/study.py

It knows the embedded model alone: other models and tasks may rank otherwise. What it found is in RESULTS.md.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Option

from _study.plots import write_plots
from _study.running import run_study
from _study.settings import FULL, QUICK
from pyreft.errors import ReftError
from pyreft.inspect.plots import check_matplotlib
from pyreft_cli.console import console, hush, print_json, progress_bar
from pyreft_cli.options import Json, Quiet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def study(
    tasks: Annotated[str, Option(help="Which tasks: emoji, middle, emoji-long, middle-long, or all.")] = "all",
    seeds: Annotated[int | None, Option(help="How many seeds for each adapter.  [default: 3]")] = None,
    quick: Annotated[bool, Option("--quick", help="A few adapters and steps, in seconds: it shows the form.")] = False,
    jobs: Annotated[int, Option(help="Processes that share the work, of one thread each.")] = 2,
    output: Annotated[
        Path,
        Option(help="The directory for study.json, study.png and study.svg; those of an earlier run are replaced."),
    ] = Path("pyreft-study"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare LoReFT, DiReFT, RED and LoRA, at all tokens or some, on the embedded model: score against cost.

    Minutes on two cores. Interrupted, it leaves what is done in study.json. The pictures need matplotlib: pip install
    "pyreft[plot]". With --json, the numbers are printed and no pictures are drawn.
    """
    hush()
    plan = QUICK if quick else FULL
    plan = plan if seeds is None else replace(plan, seeds=seeds)
    shown = not (quiet or as_json)
    with progress_bar("Training adapters", shown=shown, unit="adapters") as move:

        def progress(done: int, total: int) -> None:  # told for the first time when all that was given is checked
            if not as_json:
                check_matplotlib()
            move(done, total)

        found = run_study(output, plan=plan, tasks=tasks, jobs=jobs, progress=progress)
    if as_json:
        print_json(found)
        return
    paths = write_plots(found, output)
    if shown:
        _tell(found)
        console.print(f"Written to {output}: study.json, {' and '.join(path.name for path in paths)}.", markup=False)


def _tell(found: dict[str, Any]) -> None:
    for task, on in found["frontier"].items():
        table = Table(title=f"{task}: held-out answers exactly right", title_justify="left")
        for column in ("adapter", "parameters", "seconds", "right, %", "sd", "frontier"):
            table.add_column(column, justify="left" if column in ("adapter", "frontier") else "right")
        points = [point for point in found["means"] if point["task"] == task]
        for point in sorted(points, key=lambda point: point["parameters"]):
            best = [cost for cost, names in on.items() if point["name"] in names]
            sd = "" if point["sd"] is None else f"{100 * point['sd']:.0f}"
            figures = f"{point['parameters']:,}", f"{point['seconds']:.1f}", f"{100 * point['score']:.0f}", sd
            table.add_row(point["name"], *figures, "both" if len(best) > 1 else "".join(best))
        console.print(table)
    rules = found["rules"]["against"]
    for rule, differences in rules.items():
        if rule != "baseline":
            after = (f"{_points(differences[kind])} after equal {kind}" for kind in ("steps", "seconds"))
            console.print(f"{rule} against {rules['baseline']}: {', '.join(after)}", markup=False)


def _points(difference: dict[str, float | None]) -> str:
    """A difference of scores in percentage points, with its standard error."""
    mean, error = difference["mean"], difference["error"]
    assert mean is not None
    return f"{100 * mean:+.0f}" + ("" if error is None else f" ± {100 * error:.0f}")


def main() -> None:
    try:
        app()
    except ReftError as error:
        print(f"study: {error.told({error.setting: f'--{error.setting}'} if error.setting else {})}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
