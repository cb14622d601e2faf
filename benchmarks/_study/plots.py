"""A study as a picture: held-out scores against trained parameters and against training seconds.

Needs matplotlib, the extra `plot`.
"""

from pathlib import Path
from typing import Any

from pyreft.inspect.plots import COLOURS, INK, check_matplotlib

_COLOUR = {"LoReFT": COLOURS[0], "DiReFT": "#2a9d8f", "RED": "#e9a13b", "LoRA": COLOURS[1], "located LoRA": "#7b5ea7"}
_MARKER = {"LoReFT": "o", "DiReFT": "s", "RED": "^", "LoRA": "D", "located LoRA": "P"}
_COST = {"parameters": "trained parameters", "seconds": "training, seconds of processor time"}
_LINE = 0.04  # what a line of text takes on the axis of scores
_MOST_NAMED = 8  # of more points in one picture, only those on the frontier are named


def plot_study(found: dict[str, Any]) -> Any:
    """Draw a column for each task, and return the matplotlib figure.

    Above stand the scores against the parameters, of tasks with adapters of several sizes; below against the seconds,
    for the position rules as they grow with the steps. A line joins what is on the frontier.

    Args:
        found: what `running.run_study` returns.

    Raises:
        ReftError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    tasks = list(found["frontier"])
    figure = Figure(figsize=(4.6 * len(tasks), 8), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False, sharey="row")
    for column, task in enumerate(tasks):
        points = [point for point in found["means"] if point["task"] == task]
        grid[0, column].set_title(task, loc="left", color=INK)
        if len({point["parameters"] for point in points}) > 1:
            _draw_points(grid[0, column], points, found["frontier"][task], "parameters")
            _count_in_powers_of_two(grid[0, column], [point["parameters"] for point in points])
        else:
            grid[0, column].axis("off")
        _draw_points(grid[1, column], points, found["frontier"][task], "seconds")
        _draw_growth(grid[1, column], found["rows"], task)
    for row in grid:
        row[0].set_ylabel("held-out answers exactly right, share", color=INK)
    methods = dict(zip(*reversed(grid[1, 0].get_legend_handles_labels()), strict=True))
    figure.legend(methods.values(), methods.keys(), loc="outside lower center", ncols=len(methods), frameon=False)
    return figure


def write_plots(found: dict[str, Any], directory: Path) -> list[Path]:
    """Write `study.png` and `study.svg` into a directory and return their paths.

    Raises:
        ReftError: matplotlib is not installed.
    """
    figure = plot_study(found)
    import matplotlib

    paths = [directory / "study.png", directory / "study.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        figure.savefig(paths[0], dpi=110)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_points(axes: Any, points: list[dict[str, Any]], on: dict[str, list[str]], cost: str) -> None:
    best = {point["name"]: point for point in points if point["name"] in on[cost]}
    line = [best[name] for name in on[cost]]
    axes.plot([p[cost] for p in line], [p["score"] for p in line], color=INK, linewidth=1, linestyle=":", zorder=1)
    for method, colour in _COLOUR.items():
        own = [point for point in points if point["method"] == method]
        if own:
            across, up = [point[cost] for point in own], [point["score"] for point in own]
            axes.errorbar(across, up, [p["sd"] or 0 for p in own], fmt="none", ecolor=colour, alpha=0.35, zorder=2)
            axes.scatter(across, up, color=colour, marker=_MARKER[method], s=26, label=method, zorder=3)
    _name_points(axes, points if len(points) <= _MOST_NAMED else list(best.values()), cost)
    axes.set_xlabel(_COST[cost], color=INK)
    axes.set_ylim(-0.02, 1.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelcolor=INK)


def _name_points(axes: Any, points: list[dict[str, Any]], cost: str) -> None:
    """Write the names beside the points, on the left of those in the right half; on each side one below another."""
    middle = (min(point[cost] for point in points) + max(point[cost] for point in points)) / 2
    lowest = {"left": 2.0, "right": 2.0}
    for point in sorted(points, key=lambda point: -point["score"]):
        side = "right" if point[cost] > middle else "left"
        lowest[side] = height = min(point["score"], lowest[side] - _LINE)
        shift = -5 if side == "right" else 5
        axes.annotate(
            point["name"], (point[cost], height), (shift, 3), textcoords="offset points", ha=side, fontsize=7, color=INK
        )


def _count_in_powers_of_two(axes: Any, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(min(values).bit_length() - 1, max(values).bit_length() + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def _draw_growth(axes: Any, rows: list[dict[str, Any]], task: str) -> None:
    """Thin lines: the mean score of each position rule after so many steps, at the seconds that these took."""
    grown: dict[str, list[list[dict[str, float]]]] = {}
    for row in rows:
        if row["task"] == task and (row["method"], row["rank"], row["layers"]) == ("LoReFT", 4, "all"):
            grown.setdefault(row["name"], []).append(row["curve"])
    for curves in grown.values():
        marks = list(zip(*curves, strict=True))
        seconds, scores = ([sum(c[key] for c in mark) / len(mark) for mark in marks] for key in ("seconds", "score"))
        axes.plot([0, *seconds], [0, *scores], color=_COLOUR["LoReFT"], linewidth=0.8, alpha=0.5, zorder=1)
