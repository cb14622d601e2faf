"""An adapter on a file of examples that it was not trained on: its loss, and its answers beside those expected."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.encode import context_length, default_format, encode_all
from ..data.fields import Example
from ..data.files import Reading, Tally, read_examples
from ..data.padding import pads_rows
from ..data.tally import LongRows
from ..errors import ReftError
from ..files.record import read_format
from ..generation import answer_ids
from ..loading import check_rules, least_prompt, load_adapted
from ..positions import IGNORED
from .limits import check_values


def evaluate_file(
    adapter: str | Path,
    data: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    reading: Reading | None = None,
    long_rows: LongRows = "refuse",
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answer the prompts of a file and compare.

    Args:
        adapter: the adapter's directory.
        data, reading: see `data.files.read_examples`.
        model: the base model, if not the one that the adapter remembers.
        dtype: of the base model, see `loading.load_base`.
        long_rows: what becomes of rows that do not fit, see `data.encode.encode`.
        max_new_tokens: the most tokens of an answer.
        progress: called with how many are answered and how many there are.

    Returns:
        `count`, `loss` (of a token of the expected answers, on average), `exact` (the share of answers that equal the
        expected one but for spaces around it), `answers`, each with `where`, `prompt`, `expected`, `answer` and
        `right`; `wrong`, how many rows were left out as wrong, with what `listed` says of the first ten; `skipped` and
        `cut`, how many were left out, or cut, as too long.

    Raises:
        ReftError: an adapter or a file that cannot be read, or rows that are too long.
    """
    check_values({"long_rows": long_rows})
    reading = reading or Reading()
    tally = Tally(reading.on_error)
    examples = read_examples(data, reading, tally)
    check_rules(adapter)
    adapted, tokenizer = load_adapted(adapter, model, dtype or "auto")
    form: Any = read_format(adapter) or default_format(tokenizer, examples)
    limit, least = context_length(adapted.get_base_model(), tokenizer), least_prompt(adapter)
    examples, rows = encode_all(tokenizer, examples, form, limit, long_rows=long_rows, tally=tally, least=least)
    _check_asked(examples, rows)
    answers: list[dict[str, Any]] = []
    found = answered(adapted, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    for example, (wanted, given) in zip(examples, found, strict=True):
        asked = {"where": example.where, "prompt": example.messages[-2]["content"]}
        answers.append({**asked, "expected": wanted, "answer": given, "right": wanted == given})
        if progress:
            progress(len(answers), len(rows))
    loss = mean_loss(adapted, padded_batches(tokenizer, rows, batch_size))
    return {
        "count": len(rows),
        "loss": loss,
        "exact": sum(answer["right"] for answer in answers) / len(rows),
        "answers": answers,
        "wrong": len(tally.wrong),
        "listed": tally.listed(),
        "skipped": tally.skipped,
        "cut": tally.cut,
    }


def _check_asked(examples: Sequence[Example], rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a prompt without a token: nothing can be generated from it, and beside others it would be of padding."""
    for example, row in zip(examples, rows, strict=True):
        if row["labels"][0] != IGNORED:
            raise ReftError(f"{example.where}: the prompt is empty, and the tokenizer begins no text by itself.")


def answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], **options: Any
) -> Iterator[tuple[str, str]]:
    """Yield for each row the expected answer and a model's own, without spaces around them.

    Args:
        rows: with labels on the answer alone.
        options: see `generation.answer_ids`.
    """
    lengths = [row["labels"].count(IGNORED) for row in rows]
    prompts = [row["input_ids"][:length] for row, length in zip(rows, lengths, strict=True)]
    expected = [row["input_ids"][length:] for row, length in zip(rows, lengths, strict=True)]
    for pair in zip(expected, answer_ids(model, tokenizer, prompts, **options), strict=True):
        wanted, given = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in pair)
        yield wanted, given


def padded_batches(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Rows in their order, padded."""
    pad = pads_rows(tokenizer)
    for start in range(0, len(rows), batch_size):
        yield pad(list(rows[start : start + batch_size]))


def mean_loss(model: Any, batches: Iterable[Any], **given: Any) -> float:
    """The loss of a labelled token, on average over all rows.

    Args:
        model: a causal language model.
        batches: with labels.
        given: to each call of the model.

    Raises:
        ReftError: there are no labels.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            total += float(model(**inputs, **given).loss) * labelled
            count += labelled
    if not count:
        raise ReftError("expected answers with tokens behind a prompt.")
    return total / count
