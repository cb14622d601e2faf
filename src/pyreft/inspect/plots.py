"""What was measured, as pictures: each function draws one of them on matplotlib axes and returns the axes.

Needs matplotlib, the extra `plot`. Figures are made without pyplot, so no window opens and nothing has to be closed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ReftError
from .compare import Comparison
from .directions import WrittenDirections
from .recorded import place_names
from .sizes import EditSizes
from .strength import StrengthCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, NOTHING = "#30343b", "#f1f1f4"
COLOURS = ("#3d5a98", "#d1495b", "#8d99ae", "#c9cfdb")
_MOST = 48  # columns of a heat map
_GAP = "…"


def check_matplotlib() -> None:
    """Refuse to go on where matplotlib is not installed.

    Raises:
        ReftError: it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReftError(
            'The pictures need matplotlib, which is not installed: pip install "pyreft[plot]". The numbers do without: '
            "the commands print them with --json."
        ) from None


def new_axes(width: float, height: float, rows: int = 1) -> Any:
    """Return the axes of a new figure of this size in inches; an array of them if several rows are asked for."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots(rows, 1)


def plot_sizes(sizes: EditSizes, *, relative: bool = False, axes: "Axes | None" = None) -> "Axes":
    """Draw a heat map of the sizes of edits, places by tokens; of a longer text, what is not edited is one gap.

    Args:
        sizes: of one text, or means by position.
        relative: draw ‖h' - h‖ / ‖h‖ instead of ‖h' - h‖.
        axes: where to draw; a new figure if not given.

    Raises:
        ReftError: matplotlib is not installed.
    """
    table, name = (sizes.relative, "‖h′ − h‖ / ‖h‖") if relative else (sizes.size, "‖h′ − h‖")
    columns = shown_columns(sizes)
    labels = [_GAP if column is None else readable(sizes.labels[column]) for column in columns]
    empty = torch.full((len(table),), torch.nan)
    cells = torch.stack([empty if column is None else table[:, column] for column in columns], dim=1)
    if axes is None:
        axes = new_axes(*heat_map_size(sizes))
    assert axes is not None
    figure: Any = axes.figure
    axes.set_facecolor(NOTHING)
    most = float(cells[~cells.isnan()].max()) if not bool(cells.isnan().all()) else 1.0
    image = axes.imshow(cells.numpy(), aspect="auto", cmap="YlGnBu", vmin=0, vmax=most or 1.0)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(sizes.places)), place_names(sizes.places))
    axes.set_xticks([x - 0.5 for x in range(1, len(labels))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(sizes.places))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_title("Edit relative to the state" if relative else "Size of the edit", loc="left", color=INK, fontsize=11)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label=name)
    bar.outline.set_visible(False)
    bar.ax.yaxis.label.set_color(INK)
    bar.ax.tick_params(length=0, labelcolor=INK)
    if cells.numel() <= 200:
        for y, x in (~cells.isnan()).nonzero().tolist():
            value = float(cells[y, x])
            dark = value > 0.6 * most
            axes.text(x, y, _short(value), ha="center", va="center", fontsize=8, color="white" if dark else INK)
    return axes


def plot_directions(directions: Sequence[WrittenDirections], *, axes: "Axes | None" = None) -> "Axes":
    """Draw how much of each place's edits lies along its strongest directions, with the nearest token in each bar.

    Raises:
        ReftError: matplotlib is not installed.
    """
    axes = new_axes(8, 1.3 + 0.42 * len(directions)) if axes is None else axes
    assert axes is not None
    for y, written in enumerate(directions):
        left = 0.0
        for number, direction in enumerate(written.directions):
            colour = COLOURS[min(number, 3)]
            axes.barh(y, direction.share, left=left, color=colour, edgecolor="white", height=0.7)
            if direction.towards and direction.share > 0.12:
                word = readable(direction.towards[0][0].strip() or direction.towards[0][0])
                light = "white" if number < 2 else INK
                axes.text(left + direction.share / 2, y, word, ha="center", va="center", color=light, fontsize=9)
            left += direction.share
    axes.set_yticks(range(len(directions)), place_names([written.place for written in directions]))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the sum of ‖h′ − h‖² along the first, second, third direction", color=INK)
    axes.set_title("Directions that are written, with the token nearest to each", loc="left", color=INK, fontsize=11)
    return _plain(axes)


def plot_strengths(curves: Sequence[StrengthCurve], *, axes: "Axes | None" = None) -> "Axes":
    """Draw the loss against the strength of the edit; 0 is the base model, 1 the adapter as it is.

    Raises:
        ReftError: matplotlib is not installed.
    """
    axes = new_axes(7, 4) if axes is None else axes
    assert axes is not None
    for curve, colour in zip(curves, COLOURS, strict=False):
        axes.plot(curve.strengths, curve.losses, marker="o", markersize=4, color=colour, label=curve.answers)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("strength s of the edit, h′ = h + s (Φ(h) − h)", color=INK)
    axes.set_ylabel("loss, nats per token", color=INK)
    axes.set_title("Loss by strength", loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, title="loss on")
    return _plain(axes)


def plot_comparison(comparison: Comparison, *, axes: "Axes | None" = None) -> "Axes":
    """Draw, place by place, how alike two adapters are: subspace overlap, its chance level, and cosine of the edits.

    Raises:
        ReftError: no place that both edit, or matplotlib is not installed.
    """
    if not comparison.places:
        raise ReftError("plot_comparison: the two adapters edit no place in common; there is nothing to draw.")
    own = axes is None
    axes = new_axes(8, 1.6 + 0.6 * len(comparison.places)) if axes is None else axes
    assert axes is not None
    figure: Any = axes.figure
    for y, entry in enumerate(comparison.places):
        overlap, cosine = (None if y else name for name in ("overlap of the subspaces", "cosine of the edits"))
        axes.barh(y - 0.19, entry.overlap, height=0.34, color=COLOURS[0], label=overlap)
        if entry.cosine is not None:
            axes.barh(y + 0.19, entry.cosine, height=0.34, color=COLOURS[1], label=cosine)
        chance = None if y else "overlap by chance"
        axes.plot([entry.chance] * 2, [y - 0.4, y + 0.02], color=INK, linewidth=1.5, label=chance)
    axes.set_yticks(range(len(comparison.places)), place_names([entry.place for entry in comparison.places]))
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    lowest = min(0.0, *(entry.cosine or 0.0 for entry in comparison.places))
    axes.set_xlim(1.1 * lowest, 1)
    axes.set_xlabel("1: the same directions; 0: orthogonal", color=INK)
    axes.set_title("How alike the two adapters are", loc="left", color=INK, fontsize=11)
    legend = {"ncols": 3, "loc": "outside lower left"} if own else {}
    (figure if own else axes).legend(frameon=False, **legend)
    return _plain(axes)


def heat_map_size(sizes: EditSizes) -> tuple[float, float]:
    """Width and height in inches in which a heat map can be read."""
    return 3.2 + 0.44 * len(shown_columns(sizes)), 1.9 + 0.36 * len(sizes.places)


def shown_columns(sizes: EditSizes) -> list[int | None]:
    """The columns of a heat map; none stands for several without an edit, or beyond what fits, of a longer text."""
    if len(sizes.labels) <= _MOST // 2:
        return list(range(len(sizes.labels)))
    filled = (~sizes.size.isnan()).any(0).tolist()
    columns: list[int | None] = []
    start = 0
    while start < len(filled):
        stop = start + 1
        while stop < len(filled) and filled[stop] == filled[start]:
            stop += 1
        columns += [None] if not filled[start] and stop - start > 3 else range(start, stop)
        start = stop
    half = _MOST // 2
    return columns if len(columns) <= _MOST else [*columns[:half], None, *columns[-half:]]


def readable(token: str, most: int = 14) -> str:
    """A token as a label: spaces and line ends shown, what the font cannot draw by its code, long ones cut."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    shown = token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    if len(shown) > most:
        shown = shown[: most - 1] + _GAP
    known = [c if c.isprintable() and font.get_char_index(ord(c)) else f"U+{ord(c):X}" for c in shown]
    return "".join(known).replace("$", r"\$")  # a pair of dollars would be set as a formula


def _plain(axes: "Axes") -> "Axes":
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    return axes


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"
