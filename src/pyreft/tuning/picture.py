"""The trainings of a study as a picture: their scores against parameters and against seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ReftError
from ..inspect.plots import COLOURS, INK, new_axes
from .records import DONE, Cost, Record, best_of, frontier

_COSTS: tuple[tuple[Cost, str], ...] = (
    ("parameters", "trained parameters"),
    ("seconds", "training, seconds"),
)


def plot_frontier(records: Sequence[Record], score: str) -> Any:
    """Draw the score of each training against its parameters above, its seconds below; return the figure.

    A line joins what no cheaper training is as good as. The best one and what nobody has tuned are named.

    Args:
        records: of a study.
        score: `loss`, or `exact`, which is drawn in percent.

    Raises:
        ReftError: matplotlib is not installed.
    """
    both = new_axes(7, 8, rows=2)
    done = [record for record in records if record.state == DONE]
    named = {id(best_of(done)): "best", id(best_of(r for r in done if r.default)): "not tuned"}
    for axes, (cost, label) in zip(both, _COSTS, strict=True):
        line = frontier(done, cost)
        axes.plot(*_points(line, cost, score), color=INK, linewidth=1, linestyle=":", zorder=1)
        for formula, colour in zip(dict.fromkeys(r.settings["intervention"] for r in done), COLOURS * 3, strict=False):
            own = [record for record in done if record.settings["intervention"] == formula]
            axes.scatter(*_points(own, cost, score), color=colour, s=26, label=formula, zorder=2)
        for record in done:
            if id(record) in named:
                ((across,), (up,)) = _points([record], cost, score)
                axes.annotate(named[id(record)], (across, up), (6, 4), textcoords="offset points", color=INK)
        axes.set_xscale("log")
        axes.set_xlabel(label, color=INK)
        axes.set_ylabel("held-out loss" if score == "loss" else "held-out answers exactly right, %", color=INK)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelcolor=INK)
    both[0].legend(frameon=False)
    return both[0].figure


def write_frontier(records: Sequence[Record], score: str, path: Path) -> None:
    """Draw the frontier into a file, where matplotlib is installed."""
    try:
        figure = plot_frontier(records, score)
    except ReftError:
        return
    figure.savefig(path, metadata={"Date": None})


def _points(records: Sequence[Record], cost: Cost, score: str) -> tuple[list[Any], list[Any]]:
    across = [getattr(record, cost) for record in records]
    return across, [record.loss if score == "loss" else 100 * (record.exact or 0.0) for record in records]
