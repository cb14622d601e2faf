"""The loss of a training as a table and a picture."""

import csv
from pathlib import Path


def write_losses(directory: Path, history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Write the losses of a Trainer's log as `loss.csv`, and as `loss.png` where matplotlib is installed."""
    found = {
        name: [(entry["step"], float(entry[key])) for entry in history if key in entry]
        for name, key in (("loss", "loss"), ("validation_loss", "eval_loss"))
    }
    with open(directory / "loss.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *found])
        by_step = {name: dict(points) for name, points in found.items()}
        for step in sorted({step for points in found.values() for step, _ in points}):
            writer.writerow([step, *(by_step[name].get(step, "") for name in found)])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return found
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, points in found.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
    return found
