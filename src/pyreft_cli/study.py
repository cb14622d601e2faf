"""`pyreft study`: small adapters of the embedded model beside each other, as a table, a picture and numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pyreft_cli.output import Json, Quiet, console, hush, print_json, progress_bar

Option = typer.Option


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
    """Compare LoReFT, DiReFT, RED and LoRA on the embedded model: score against parameters and training time.

    Minutes on two cores. Interrupted, it leaves what is done in study.json. The pictures need matplotlib: pip install
    "pyreft[plot]". With --json, the numbers are printed and no pictures are drawn.
    """
    hush()
    from pyreft.inspect.plots import check_matplotlib
    from pyreft.study import FULL, QUICK, run_study

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
    from pyreft.study.plots import write_plots

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
