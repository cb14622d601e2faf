"""What happens when an edit is made weaker or stronger: h' = h + s (Φ(h) - h), for s from 0 to 2, say.

Either the loss on given answers against s, or, where there are prompts alone, the answers at each s and how likely the
base model's and the adapter's own answers are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ReftError
from ..generation import answer_ids
from ..jobs.held_out import mean_loss
from ..positions import IGNORED
from ..tuner.adapted import evaluating
from .examples import Row, batches

STRENGTHS = tuple(step / 4 for step in range(9))
"""From 0 to 2."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StrengthCurve:
    """The loss on some answers, by strength.

    Args:
        answers: whose they are.
        strengths: `[n]`, 0 is the base model and 1 the adapter as it is.
        losses: `[n]`, the mean over the answers' tokens of -log p, in nats.
    """

    answers: str
    strengths: list[float]
    losses: list[float]


@dataclass(frozen=True)
class StrengthAnswers:
    """The answers to some prompts, by strength: greedy, as text, `[strengths][prompts]`."""

    strengths: list[float]
    answers: list[list[str]]


def loss_by_strength(
    model: Any,
    rows: Sequence[Row],
    strengths: Sequence[float] = STRENGTHS,
    *,
    answers: str = "given answers",
    batch_size: int = 8,
) -> StrengthCurve:
    """Return the loss of a causal language model on rows with answers, at each strength of its active adapters.

    The model is run in evaluation mode, and left as it was.

    Raises:
        ReftError: no strengths, one that is not finite, or rows without answers.
    """
    _check(strengths)
    if not rows or not all("labels" in row and max(row["labels"][1:], default=IGNORED) >= 0 for row in rows):
        raise ReftError("loss_by_strength: expected rows with answers, that is with labels; see read_rows.")
    values = [float(strength) for strength in strengths]
    with evaluating([model]):
        losses = [mean_loss(model, batches(rows, batch_size, model.device), strength=value) for value in values]
    return StrengthCurve(answers, values, losses)


def answers_by_strength(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    strengths: Sequence[float] = STRENGTHS,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> tuple[StrengthAnswers, list[StrengthCurve]]:
    """Return a causal language model's answers to prompts at each strength, and two curves of the loss.

    The curves say how likely two answers are at each strength: that of the base model, and that of the adapter at
    strength 1. Where they cross, the answer turns. The model is run in evaluation mode, and left as it was.

    Args:
        rows: prompts; see `text_rows`.
        progress: called after each strength with how many are done, and of how many.

    Raises:
        ReftError: no strengths, one that is not finite, or a tokenizer without a padding token.
    """
    _check(strengths)
    if tokenizer.pad_token_id is None:
        raise ReftError("The tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token first.")
    prompts = [row["input_ids"] for row in rows]
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    asked = dict.fromkeys([0.0, 1.0, *map(float, strengths)])
    found = {}
    for number, strength in enumerate(asked, 1):
        with evaluating([model]):
            found[strength] = list(answer_ids(model, tokenizer, prompts, strength=strength, **options))
        if progress is not None:
            progress(number, len(asked))
    texts = {s: tokenizer.batch_decode(ids, skip_special_tokens=True) for s, ids in found.items()}
    curves = [
        loss_by_strength(model, _answered(prompts, found[s]), strengths, answers=whose, batch_size=batch_size)
        for s, whose in ((0.0, "the base model's answer"), (1.0, "the adapter's answer"))
    ]
    return StrengthAnswers([float(s) for s in strengths], [texts[float(s)] for s in strengths]), curves


def _answered(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Row]:
    return [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _check(strengths: Sequence[float]) -> None:
    if not len(strengths):
        raise ReftError("expected at least one number, got none.", setting="strengths")
    if not all(map(math.isfinite, strengths)):
        raise ReftError(f"expected finite numbers, got {', '.join(map(str, strengths))}.", setting="strengths")
