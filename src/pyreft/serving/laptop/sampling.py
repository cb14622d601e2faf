"""From logits to the next token, for one row: penalties, temperature, top-k, top-p, and a seed of its own.

What a request gets depends on its own settings and seed alone, never on who is beside it in the batch.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ReftError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token, as does one below 1e-5, by which nothing can be divided.
        top_k: choose among the so many likeliest, 0 for all.
        top_p: choose among the fewest that have this probability together.
        min_p: choose among those that have this part of the likeliest one's probability.
        seed: of the draws; none for another one each time.
        frequency_penalty: taken from a token's logit for each time that it was answered.
        presence_penalty: taken from it if it was answered at all.
        repetition_penalty: divides a positive logit, and multiplies a negative, of tokens of prompt and answer.
        bias: added to the logits of some tokens.
        logprobs: how many likeliest tokens are told with each, none for no probabilities at all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


class Choice(NamedTuple):
    """A token, and its log-probability by the model itself: before penalties and temperature."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens with theirs


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: how.
        prompt: the ids that the answer follows.
        index: its number among the answers of one request, which makes another seed of the request's.
    """

    def __init__(self, sampling: Sampling, prompt: list[int], index: int = 0) -> None:
        self.sampling, self._prompt = sampling, prompt
        self._answered: Counter[int] = Counter()
        asked = sampling.repetition_penalty != 1, sampling.frequency_penalty, sampling.presence_penalty, sampling.bias
        self._penalizes = any(asked)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + index) % 2**63)

    def choose(self, logits: Tensor) -> Choice:
        """Return the next token after the logits `[vocabulary]`."""
        logits = logits.float().cpu()
        if not logits.max().isfinite():
            raise ReftError("the model's logits are not finite; is the adapter damaged, or its strength too large?")
        token = self._draw(self._penalized(logits.clone()) if self._penalizes else logits)
        self._answered[token] += 1
        return told(logits, token, self.sampling.logprobs)

    def _penalized(self, logits: Tensor) -> Tensor:
        asked = self.sampling
        if asked.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self._prompt, *self._answered}))
            there = logits[seen]
            logits[seen] = torch.where(there > 0, there / asked.repetition_penalty, there * asked.repetition_penalty)
        if self._answered and (asked.frequency_penalty or asked.presence_penalty):
            tokens = torch.tensor(list(self._answered))
            counts = torch.tensor(list(self._answered.values()), dtype=torch.float32)
            logits[tokens] -= asked.frequency_penalty * counts + asked.presence_penalty
        for token, bias in asked.bias.items():
            logits[token] += bias
        return logits

    def _draw(self, logits: Tensor) -> int:
        asked = self.sampling
        if asked.temperature < 1e-5:
            return int(logits.argmax())
        logits, tokens = (logits / asked.temperature).sort(descending=True, stable=True)
        if asked.top_k:
            logits, tokens = logits[: asked.top_k], tokens[: asked.top_k]
        probabilities = logits.softmax(-1)
        if asked.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = torch.where(before < asked.top_p, probabilities, 0.0)
        if asked.min_p:
            probabilities = torch.where(probabilities < asked.min_p * probabilities[0], 0.0, probabilities)
        return int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])


def told(logits: Tensor, token: int, top: int | None) -> Choice:
    """Return a token with its log-probability and the likeliest tokens, as far as they are asked for."""
    if top is None:
        return Choice(token)
    known = logits.float().log_softmax(-1)
    best = known.topk(min(top, len(known))) if top else None
    likeliest = () if best is None else zip(best.indices.tolist(), map(_written, best.values.tolist()), strict=True)
    return Choice(token, _written(known[token].item()), tuple(likeliest))


def _written(logprob: float) -> float:
    """As JSON has it, which knows no infinity."""
    return logprob if math.isfinite(logprob) else -9999.0
