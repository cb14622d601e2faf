"""The loss of a training as a table and a picture."""

import csv
from pathlib import Path

TABLE, PICTURE = "loss.csv", "loss.png"

Losses = dict[str, list[tuple[int, float]]]


def losses_of(history: list[dict]) -> Losses:
    """The points (step, loss) of a Trainer's log, by name."""
    return {
        name: [(entry["step"], float(entry[key])) for entry in history if key in entry]
        for name, key in (("loss", "loss"), ("validation_loss", "eval_loss"))
    }


def write_losses(directory: str | Path, found: Losses) -> None:
    """Write losses as `loss.csv`, and as `loss.png` where matplotlib is installed."""
    write_table(directory, found)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, points in found.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.legend()
    figure.savefig(Path(directory) / PICTURE, dpi=120)


def write_table(directory: str | Path, found: Losses) -> None:
    """Write losses as `loss.csv`."""
    with open(Path(directory) / TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *found])
        by_step = {name: dict(points) for name, points in found.items()}
        for step in sorted({step for points in found.values() for step, _ in points}):
            writer.writerow([step, *(by_step[name].get(step, "") for name in found)])
