"""Spans of a prompt to edit: marked in the text, or given by the numbers of their characters.

Knows tokenizers and texts, nothing of models or edits.
"""

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import ReftError
from .supervised import make_data_module, stack_locations

Spans = Sequence[tuple[int, int]]


def read_spans(text: str, markers: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without its markers, and the spans `(start, end)` in characters that they enclosed.

    Raises:
        ReftError: a marker without its counterpart, or spans within spans.

    >>> read_spans("the [[big]] cat", ("[[", "]]"))
    ('the big cat', [(4, 7)])
    """
    begin, end = markers
    clean, *pieces = text.split(begin)
    spans = []
    for piece in pieces:
        inside, *after = piece.split(end)
        if len(after) != 1:
            raise ReftError(
                f"Expected each {begin!r} to be followed by one {end!r}, without another between: {text!r}."
            )
        spans.append((len(clean), len(clean) + len(inside)))
        clean += inside + after[0]
    if end in clean:
        raise ReftError(f"Expected a {begin!r} before each {end!r}: {text!r}.")
    return clean, spans


def encode_spans(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    markers: tuple[str, str] = ("[[", "]]"),
    spans: Sequence[Spans] | None = None,
    num_interventions: int = 1,
    span_of: Sequence[int] | None = None,
    **options: Any,
) -> BatchEncoding:
    """Tokenize prompts, and locate the tokens of the spans in them, for a call or `generate` of an adapted model.

    A token is located if any of its characters lies in the span. The model never sees the markers.

    Args:
        tokenizer: a fast one, which knows where the characters of each token are.
        texts: prompts with marked spans, or plain ones beside `spans`.
        markers: what stands before and after a span.
        spans: `(start, end)` in characters for each text, instead of markers.
        num_interventions: of the adapter; each edits all spans.
        span_of: for each intervention, the number of the one span that it edits.
        options: for the tokenizer.

    Returns:
        What the tokenizer returns, as padded tensors, and `intervention_locations`,
        `[batch, interventions, positions]`.

    Raises:
        ReftError: markers that do not match, a text with too few spans, a span without a token, or a slow tokenizer.
    """
    texts, spans = _split(texts, markers, spans)
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_offsets_mapping=_fast(tokenizer), **options)
    offsets = batch.pop("offset_mapping").tolist()
    places = [_by_intervention(*row, num_interventions, span_of) for row in zip(texts, spans, offsets, strict=True)]
    batch["intervention_locations"] = stack_locations(places, [0] * len(texts))
    return batch


def make_span_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    markers: tuple[str, str] = ("[[", "]]"),
    spans: Sequence[Spans] | None = None,
    num_interventions: int = 1,
    span_of: Sequence[int] | None = None,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Return a training set that is edited at spans of each prompt, with its collator.

    As `make_last_position_supervised_data_module`, with the arguments of `encode_spans`.
    """
    texts, spans = _split(inputs, markers, spans)
    offsets = tokenizer(texts, return_offsets_mapping=_fast(tokenizer))["offset_mapping"]
    places = [_by_intervention(*row, num_interventions, span_of) for row in zip(texts, spans, offsets, strict=True)]
    return make_data_module(tokenizer, texts, outputs, lambda number, length: places[number], nonstop=nonstop)


def _split(
    texts: Sequence[str], markers: tuple[str, str], spans: Sequence[Spans] | None
) -> tuple[list[str], list[Spans]]:
    if spans is None:
        read = [read_spans(text, markers) for text in texts]
        return [text for text, _ in read], [found for _, found in read]
    if len(spans) != len(texts):
        raise ReftError(f"expected a list for each of the {len(texts)} texts, got {len(spans)}.", setting="spans")
    return list(texts), list(spans)


def _fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not tokenizer.is_fast:
        raise ReftError("Spans need a fast tokenizer, which knows where the characters of each token are.")
    return True


def _by_intervention(
    text: str, spans: Spans, offsets: list[tuple[int, int]], num_interventions: int, span_of: Sequence[int] | None
) -> list[list[int]]:
    tokens = [[at for at, (left, right) in enumerate(offsets) if left < end and start < right] for start, end in spans]
    if not tokens or not all(tokens):
        raise ReftError(f"Expected at least one span with tokens in it, got {list(spans)} in {text!r}.")
    if span_of is None:
        return [sorted({at for places in tokens for at in places})] * num_interventions
    if len(span_of) != num_interventions or not all(0 <= number < len(tokens) for number in span_of):
        raise ReftError(
            f"expected for each of {num_interventions} interventions the number of one of {len(tokens)} "
            f"spans, got {list(span_of)} for {text!r}.",
            setting="span_of",
        )
    return [tokens[number] for number in span_of]
