"""An inspection as files: its pictures as PNG, and one HTML page that stands alone, with the pictures inside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .compare import Comparison
from .directions import Near
from .plots import heat_map_size, new_axes, plot_comparison, plot_directions, plot_sizes, plot_strengths
from .recorded import place_names
from .report import Inspection
from .sizes import EditSizes

SHOWN = 3  # texts with a heat map of their own
NAME = "inspect"
_NAMES = (*(f"sizes-{number}" for number in range(1, SHOWN + 1)), "sizes-mean", "directions", "strength", "comparison")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #30343b; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #e3e5ea; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { background: #f1f1f4; padding: .1rem .3rem; border-radius: .2rem; white-space: pre-wrap; }
.note { color: #6b7280; }
"""


def draw(inspection: Inspection) -> dict[str, bytes]:
    """Return the pictures of an inspection as PNG, by their names.

    Raises:
        ReftError: matplotlib is not installed.
    """
    pictures = {f"sizes-{number}": _heat_maps(sizes) for number, sizes in enumerate(inspection.sizes[:SHOWN], 1)}
    if len(inspection.sizes) > 1:
        pictures["sizes-mean"] = _heat_maps(inspection.mean)
    pictures["directions"] = _png(plot_directions(inspection.directions))
    pictures["strength"] = _png(plot_strengths(inspection.curves))
    if inspection.comparison is not None and inspection.comparison.places:
        pictures["comparison"] = _png(plot_comparison(inspection.comparison))
    return pictures


def write_page(inspection: Inspection, directory: str | Path) -> list[Path]:
    """Write `inspect.html` and the pictures, `inspect-….png`, into a directory; return the paths, the page first.

    Those of an earlier run are removed.

    Raises:
        ReftError: matplotlib is not installed.
    """
    pictures = draw(inspection)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:
        (target / f"{NAME}-{name}.png").unlink(missing_ok=True)
    paths = [target / f"{NAME}.html"]
    paths[0].write_text(page(inspection, pictures), encoding="utf-8")
    for name, picture in pictures.items():
        paths.append(target / f"{NAME}-{name}.png")
        paths[-1].write_bytes(picture)
    return paths


def page(inspection: Inspection, pictures: dict[str, bytes]) -> str:
    """Return an inspection as HTML that needs nothing else."""
    parts = [
        f"<h1>{_text(Path(inspection.adapter).name or inspection.adapter)}</h1>",
        f"<p>An adapter of <code>{_text(inspection.base_model)}</code>, looked at on {len(inspection.prompts)} "
        f"{'text' if len(inspection.prompts) == 1 else 'texts'}.</p>",
        *_size_part(inspection, pictures),
        *_direction_part(inspection, pictures),
        *_strength_part(inspection, pictures),
    ]
    if inspection.comparison is not None:
        parts += _comparison_part(inspection, inspection.comparison, pictures)
    title = f"{_text(Path(inspection.adapter).name)}, inspected"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _size_part(inspection: Inspection, pictures: dict[str, bytes]) -> list[str]:
    parts = [
        "<h2>How large the edits are</h2>",
        "<p class=note>The length of h′ − h for each edited token, and the same divided by the length of the state h. "
        "Tokens left grey are not edited; … stands for several of them.</p>",
    ]
    if "sizes-mean" in pictures:
        parts += [
            "<p>Mean over all texts: f1 is the first token of the prompt, l1 its last, +1 the next.</p>",
            _image(pictures, "sizes-mean", "Mean sizes of the edits by layer and position"),
        ]
    for number, prompt in enumerate(inspection.prompts[:SHOWN], 1):
        parts += [f"<pre>{_text(prompt)}</pre>", _image(pictures, f"sizes-{number}", "Sizes of the edits")]
    if len(inspection.prompts) > SHOWN:
        parts.append(f"<p class=note>The first {SHOWN} of {len(inspection.prompts)} texts are shown.</p>")
    return parts


def _direction_part(inspection: Inspection, pictures: dict[str, bytes]) -> list[str]:
    rows = []
    for name, written in zip(place_names(inspection.places), inspection.directions, strict=True):
        for number, direction in enumerate(written.directions):
            first = [name, str(written.rank)] if not number else ["", ""]
            rows.append([*first, f"{100 * direction.share:.1f} %", _near(direction.towards), _near(direction.away)])
    titles = ("place", "directions for 99 %", "share", "towards", "away from")
    return [
        "<h2>Which directions are written</h2>",
        "<p class=note>The right singular vectors of all edits of a place, the strongest first; its share is the part "
        "of ‖h′ − h‖² along it. The tokens are those whose rows of the unembedding, behind the last norm, have the "
        "largest cosine with the direction; in early layers they are a hint at most. Without tokens: what is written "
        "there is not the residual stream.</p>",
        _image(pictures, "directions", "Shares of the directions"),
        _table(titles, rows),
    ]


def _strength_part(inspection: Inspection, pictures: dict[str, bytes]) -> list[str]:
    parts = [
        "<h2>What the strength does</h2>",
        "<p class=note>The edit multiplied by s: 0 is the base model, 1 the adapter as it is. The loss is the mean of "
        "−log p over the tokens of the answers.</p>",
        _image(pictures, "strength", "Loss by strength"),
    ]
    if inspection.answers is not None:
        for number, prompt in enumerate(inspection.prompts[:SHOWN]):
            rows = [
                [f"{strength:g}", _text(answers[number])]
                for strength, answers in zip(inspection.answers.strengths, inspection.answers.answers, strict=True)
            ]
            parts += [f"<pre>{_text(prompt)}</pre>", _table(("strength", "answer"), rows)]
    return parts


def _comparison_part(inspection: Inspection, comparison: Comparison, pictures: dict[str, bytes]) -> list[str]:
    names = place_names([entry.place for entry in comparison.places])
    rows = [
        [
            name,
            f"{entry.ranks[0]} and {entry.ranks[1]}",
            f"{entry.overlap:.2f}",
            f"{entry.chance:.2f}",
            ", ".join(f"{angle:.0f}°" for angle in entry.angles.tolist()),
            "–" if entry.cosine is None else f"{entry.cosine:.2f} ({entry.tokens} tokens)",
        ]
        for name, entry in zip(names, comparison.places, strict=True)
    ]
    alone = [
        f"<p>Edited by {whose} alone: {_text('; '.join(place_names(places)))}.</p>"
        for whose, places in (("this adapter", comparison.only_first), ("the other", comparison.only_second))
        if places
    ]
    titles = ("place", "directions", "overlap", "by chance", "principal angles", "cosine of the edits")
    return [
        f"<h2>Beside <code>{_text(str(inspection.other))}</code></h2>",
        "<p class=note>Overlap: the mean squared cosine of the principal angles between the subspaces that the two "
        "write in, 1 where one contains the other. By chance: that of random subspaces of the same ranks.</p>",
        *([_image(pictures, "comparison", "Overlap and cosine by place")] if comparison.places else []),
        *([_table(titles, rows)] if rows else ["<p>They edit no place in common.</p>"]),
        *alone,
    ]


def _heat_maps(sizes: EditSizes) -> bytes:
    width, height = heat_map_size(sizes)
    upper, lower = new_axes(width, 2 * height, rows=2)
    plot_sizes(sizes, axes=upper)
    plot_sizes(sizes, relative=True, axes=lower)
    return _png(upper)


def _png(axes: Any) -> bytes:
    file = io.BytesIO()
    axes.figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _image(pictures: dict[str, bytes], name: str, text: str) -> str:
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML."""
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in titles) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def _near(near: Near) -> str:
    return " ".join(f'<code title="cosine {cosine:.2f}">{_text(token)}</code>' for token, cosine in near)


def _text(text: str) -> str:
    return html.escape(text)
