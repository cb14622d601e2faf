"""What a training would see of a file: a few rows by their tokens, lengths and counts, and what is left out.

Loads a tokenizer and the config of a model, and not its weights.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ..data.encode import context_length, default_format, encode_all, token_texts
from ..data.files import Example, Tally, read_examples
from ..errors import ReftError
from ..loading import load_tokenizer, read_model_config
from ..positions import IGNORED, Positions, prompt_tokens
from .settings import TrainingJob, check_settings


@dataclass(frozen=True)
class Token:
    """A token of a row: its text, whether it is learned, and whether it is edited."""

    text: str
    learned: bool
    edited: bool


@dataclass
class Preview:
    """What a training would see of its data.

    Args:
        rows, examples: how many rows the file has, and how many answers are learned from them.
        format: how prompts are written.
        context: the most tokens of a row.
        prompts, lengths: by example, the tokens of its prompt, and of prompt and answer.
        long: how many have more than fit; `long_rows` says what becomes of them.
        wrong: what is wrong with the first ten of `errors` rows.
        unread: the fields that mean nothing, with how many rows have them.
        shown: some rows, each with its place and its tokens.
    """

    rows: int
    examples: int
    format: str
    context: int
    prompts: list[int]
    lengths: list[int]
    long: int
    long_rows: str
    errors: int
    wrong: str
    unread: dict[str, int]
    shown: list[tuple[str, list[Token]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def histogram(self, bars: int = 8) -> list[tuple[int, int, int]]:
        """How many rows have so many tokens, as `(least, most, count)` of equal steps."""
        low, high = min(self.lengths), max(self.lengths)
        step = max(-(-(high - low + 1) // bars), 1)
        counts: dict[int, int] = {}
        for length in self.lengths:
            counts[(length - low) // step] = counts.get((length - low) // step, 0) + 1
        return [(low + n * step, low + n * step + step - 1, counts.get(n, 0)) for n in range(max(counts) + 1)]


def preview(job: TrainingJob, most: int = 3) -> Preview:
    """Return what a training would see of its data.

    Args:
        job: of which the data, the model, the format and the positions count.
        most: how many rows to show by their tokens.

    Raises:
        ReftError: a file that cannot be read, or no row that is right; wrong rows are counted.
    """
    check_settings(job)
    if job.data is None:
        raise ReftError("expected a file of examples.", setting="data")
    tally = Tally("skip")
    examples = read_examples(job.data, job.reading, tally)
    tokenizer = load_tokenizer(job.model)
    form = job.format or default_format(tokenizer, examples)
    context = context_length(SimpleNamespace(config=read_model_config(job.model)), tokenizer, job.max_length)
    rule = Positions.parse(job.positions)
    kept, rows = encode_all(tokenizer, examples, form, sys.maxsize, tally=tally, least=rule.least)
    lengths = [len(row["input_ids"]) for row in rows]
    return Preview(
        rows=tally.rows,
        examples=len(rows),
        format=form,
        context=context,
        prompts=[row["labels"].count(IGNORED) for row in rows],
        lengths=lengths,
        long=sum(length > context for length in lengths),
        long_rows=job.long_rows,
        errors=len(tally.wrong),
        wrong=tally.listed(),
        unread=tally.unread,
        shown=[(e.where, _tokens(tokenizer, row, rule)) for e, row in _spread(kept, rows, most)],
    )


def _spread(examples: Sequence[Example], rows: Sequence[dict[str, Any]], most: int) -> list[tuple[Example, dict]]:
    """Some of the rows, from the first to the last."""
    step = max((len(rows) - 1) / max(most - 1, 1), 1)
    numbers = dict.fromkeys(round(n * step) for n in range(most) if round(n * step) < len(rows))
    return [(examples[number], rows[number]) for number in numbers]


def _tokens(tokenizer: Any, row: dict[str, Any], rule: Positions) -> list[Token]:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    tokens = torch.ones_like(ids, dtype=torch.bool)
    edited = (tokens if rule.endless else rule.locate(prompt_tokens(tokens, labels), ids))[0]
    texts = token_texts(tokenizer, row["input_ids"])
    learned = [label != IGNORED for label in row["labels"]]
    return [Token(*one) for one in zip(texts, learned, edited.tolist(), strict=True)]
