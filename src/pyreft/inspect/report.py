"""Everything about an adapter at once: what was found on some texts, as one object that turns into plain data."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..data.encode import context_length
from ..data.fields import Format
from ..errors import ReftError
from ..files.adapter import read_config, read_shapes
from ..loading import base_of, check_generates, check_language_model, load_adapted, load_tokenizer
from ..tuner.config import shape_differences
from .compare import Comparison, compare_edits
from .directions import Unembedding, WrittenDirections, written_directions
from .examples import Row, check_edited, prompt_length, read_rows, text_rows
from .recorded import Place, RecordedEdits, record_edits
from .sizes import EditSizes, edit_sizes, mean_edit_sizes
from .strength import STRENGTHS, StrengthAnswers, StrengthCurve, answers_by_strength, loss_by_strength

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """What was found about an adapter.

    Args:
        adapter, base_model: their names.
        prompts: the texts as the model read them, without answers.
        sizes: of each text.
        mean: over the texts, by position.
        directions: what each place writes.
        curves: the loss by strength.
        answers: by strength; none where the data brings the answers.
        other: the adapter that it was compared with, if any.
        comparison: with it.
    """

    adapter: str
    base_model: str
    prompts: list[str]
    sizes: list[EditSizes]
    mean: EditSizes
    directions: list[WrittenDirections]
    curves: list[StrengthCurve]
    answers: StrengthAnswers | None = None
    other: str | None = None
    comparison: Comparison | None = None

    @property
    def places(self) -> list[Place]:
        """The edited places."""
        return self.mean.places

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: tensors as lists, None where nothing is edited."""
        return {
            "adapter": self.adapter,
            "base_model": self.base_model,
            "prompts": self.prompts,
            "places": [_place(place) for place in self.places],
            "sizes": [_sizes(sizes) for sizes in self.sizes],
            "mean": _sizes(self.mean),
            "directions": [
                {
                    "place": written.place.index,
                    "rank": written.rank,
                    "directions": [
                        {"share": d.share, "towards": d.towards, "away": d.away} for d in written.directions
                    ],
                }
                for written in self.directions
            ],
            "curves": [vars(curve) for curve in self.curves],
            "answers": vars(self.answers) if self.answers else None,
            "other": self.other,
            "comparison": _comparison(self.comparison) if self.comparison else None,
        }


def inspect_adapter(
    adapter: str | os.PathLike,
    *,
    texts: Sequence[str] = (),
    data: str | Path | None = None,
    compare: str | os.PathLike | None = None,
    model: str | None = None,
    strengths: Sequence[float] = STRENGTHS,
    most: int = 32,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> Inspection:
    """Look at an adapter from all sides, on texts or on the rows of a file.

    What can be wrong is checked before the model is loaded.

    Args:
        adapter: its directory.
        texts: prompts, or else
        data: a file of prompts (`.txt`), or of prompts with answers (`.jsonl`, `.json`, `.csv`).
        compare: the directory of another adapter for the same base model.
        model: the base model, if not the one that the adapter remembers.
        strengths: at which the loss is measured.
        most: take the first so many rows of the file.
        max_new_tokens: the most tokens of an answer, for prompts without one.
        progress: called with the name of each part when it begins.

    Raises:
        ReftError: a damaged adapter, one without its base model or for another one; no text, or one without an edited
            token; a base model that is no causal language model.
    """
    tell = progress or (lambda part: None)
    name = model or base_of(adapter)
    rows = _checked_rows(adapter, texts, data, compare, name, most)
    tell("Loading the model")
    adapted, tokenizer = _load(adapter, model, rows, max_new_tokens)
    tell("Recording the edits")
    recorded = record_edits(adapted, rows)
    directions = written_directions(adapted, tokenizer, recorded)
    tell("Changing the strength")
    answers, curves = _by_strength(adapted, tokenizer, rows, strengths, max_new_tokens)
    comparison = None
    if compare is not None:
        tell("Comparing")
        comparison = compare_edits(recorded, _record_other(adapted, compare, rows))
    return Inspection(
        adapter=str(adapter),
        base_model=name,
        prompts=[tokenizer.decode(row["input_ids"][: prompt_length(row)]) for row in rows],
        sizes=[edit_sizes(recorded, tokenizer, number) for number in range(len(rows))],
        mean=mean_edit_sizes(recorded),
        directions=directions,
        curves=curves,
        answers=answers,
        other=None if compare is None else str(compare),
        comparison=comparison,
    )


def _checked_rows(
    adapter: str | os.PathLike,
    texts: Sequence[str],
    data: str | Path | None,
    compare: str | os.PathLike | None,
    name: str,
    most: int,
) -> list[Row]:
    """Check all that can be checked without the model; return what to look at."""
    config = read_config(adapter)
    for directory in [adapter] if compare is None else [adapter, compare]:
        check_generates(directory)
    read_shapes(adapter)
    if compare is not None:
        _check_alike(adapter, compare)
    if bool(texts) == (data is not None):
        raise ReftError("Expected texts or a data file to look at the adapter on, one of the two.")
    check_language_model(name)
    tokenizer, form = load_tokenizer(name), cast(Format | None, config.prompt_format)
    rows = text_rows(tokenizer, texts, form) if data is None else read_rows(data, tokenizer, form, most=most)
    for entries in [config] if compare is None else [config, read_config(compare)]:
        layers = (entries.base_model_shape or {}).get("num_hidden_layers", 0)
        check_edited([entry.rule() for entry in entries.expand(layers)], rows)
    return rows


def _load(adapter: str | os.PathLike, model: str | None, rows: Sequence[Row], new: int) -> tuple[Any, Any]:
    """The adapted model and its tokenizer; refused where it cannot be looked at or has no room for the rows."""
    adapted, tokenizer = load_adapted(adapter, model)
    base = adapted.get_base_model()
    Unembedding(base)
    _check_lengths(rows, context_length(base, tokenizer), new)
    return adapted, tokenizer


def _by_strength(
    adapted: Any, tokenizer: Any, rows: Sequence[Row], strengths: Sequence[float], new: int
) -> tuple[StrengthAnswers | None, list[StrengthCurve]]:
    """The loss on the answers that the rows bring; else the model's own answers, and the loss on these."""
    if "labels" in rows[0]:
        return None, [loss_by_strength(adapted, rows, strengths)]
    return answers_by_strength(adapted, tokenizer, rows, strengths, max_new_tokens=new)


def _record_other(adapted: Any, directory: str | os.PathLike, rows: Sequence[Row]) -> RecordedEdits:
    """Record another adapter on the same model, and leave that as it was."""
    (name,) = adapted.peft_config
    other = "other" if name != "other" else "another"
    adapted.load_adapter(str(directory), other)
    adapted.set_adapter(other)
    try:
        return record_edits(adapted, rows)
    finally:
        adapted.set_adapter(name)
        adapted.delete_adapter(other)


def _check_alike(adapter: str | os.PathLike, other: str | os.PathLike) -> None:
    ours, theirs = read_config(adapter).base_model_shape, read_config(other).base_model_shape
    read_shapes(other)
    if differences := shape_differences(ours, theirs):
        raise ReftError(f"{other}: expected an adapter for the same base model; its base model has {differences}.")


def _check_lengths(rows: Sequence[Row], limit: int, new: int) -> None:
    for number, row in enumerate(rows, 1):
        count = len(row["input_ids"]) + (0 if "labels" in row else new)
        if count > limit:
            answer = "" if "labels" in row else f" with room for an answer of {new}"
            raise ReftError(f"Text {number} has {count} tokens{answer}, the model's context {limit}; shorten it.")


def _place(place: Place) -> dict[str, Any]:
    return {name: getattr(place, name) for name in ("index", "layer", "component", "head", "positions")}


def _sizes(sizes: EditSizes) -> dict[str, Any]:
    return {"labels": sizes.labels, "size": _list(sizes.size), "relative": _list(sizes.relative)}


def _list(table: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in table.tolist()]


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "places": [
            {
                "place": entry.place.index,
                "ranks": entry.ranks,
                "angles": entry.angles.tolist(),
                "overlap": entry.overlap,
                "chance": entry.chance,
                "cosine": entry.cosine,
                "tokens": entry.tokens,
            }
            for entry in comparison.places
        ],
        "only_first": [_place(place) for place in comparison.only_first],
        "only_second": [_place(place) for place in comparison.only_second],
    }
