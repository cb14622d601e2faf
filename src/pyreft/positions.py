"""Which tokens: a rule such as `"f7+l7"` turned into a mask of located tokens, `[batch, tokens]`.

Everything here is counted in tokens of the text, never in padding, and nothing is known of models or layers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from .errors import ReftError, did_you_mean

IGNORED = -100  # the label of tokens without loss, as in PyTorch and transformers
RULES = "f<n>, l<n>, f<n>+l<m>, prompt or all"
Rule = Callable[[Tensor, Tensor | None], Tensor]
_OWN: dict[str, Rule] = {}


def register_rule(name: str, rule: Rule) -> None:
    """Let configs and files name a rule of one's own.

    `rule(prompt, input_ids)` gets a mask `[batch, tokens]`, true for the tokens of the prompt, and the ids of the
    same shape (none if a model is called with embeddings), and returns the mask of the located tokens. Passing the
    function to `ReftConfig(positions=...)` does the same under its own name.

    Raises:
        ReftError: the name is one of the built-in rules, or not an identifier, such as that of a lambda.
    """
    if not name.isidentifier() or re.fullmatch(r"(f\d+)?(l\d+)?|prompt|all", name.lower()):
        raise ReftError(
            f"a rule of your own needs a plain name that is not {RULES}, got {name!r}.", setting="positions"
        )
    _OWN[name] = rule


def rule_name(rule: str | Rule) -> str:
    """Return the name of a rule, checked; a function is registered."""
    if callable(rule):
        register_rule(getattr(rule, "__name__", ""), rule)
        return rule.__name__
    Positions.parse(rule)
    return rule


@dataclass(frozen=True)
class Positions:
    """A position rule.

    Args:
        first: the first n tokens of the prompt.
        last: the last m tokens of the prompt. Where both are asked for, each takes at most half of the prompt,
            so that no token is edited twice; alone, a side takes at most the whole prompt.
        whole: `"prompt"` for every token of the prompt, `"all"` for those that are generated, too.
        side: take only the `"prefix"` or only the `"suffix"` of a rule that has both.
        own: the name of a registered rule.
    """

    first: int = 0
    last: int = 0
    whole: Literal["prompt", "all"] | None = None
    side: Literal["prefix", "suffix"] | None = None
    own: str | None = None

    @classmethod
    def parse(cls, rule: str) -> "Positions":
        """Read `f<n>`, `l<n>`, `f<n>+l<m>`, `prompt`, `all`, or the name of a registered rule.

        >>> Positions.parse("f7+l5")
        Positions(first=7, last=5, whole=None, side=None, own=None)
        """
        if isinstance(rule, str) and rule in _OWN:
            return cls(own=rule)
        text = str(rule).replace(" ", "").lower()
        if text in ("prompt", "all"):
            return cls(whole=cast(Literal["prompt", "all"], text))
        match = re.fullmatch(r"(?:f(\d{1,9}))?(?:(?:^|\+)l(\d{1,9}))?", text)
        if not match or not text or not any(int(n or 0) for n in match.groups()):
            hint = _nearest(text) or " A rule of your own is made known by pyreft.positions.register_rule."
            raise ReftError(f"expected {RULES}, got {rule!r}.{hint}", setting="positions")
        return cls(first=int(match[1] or 0), last=int(match[2] or 0))

    @property
    def endless(self) -> bool:
        """Whether tokens after the prompt are located, too."""
        return self.whole == "all"

    @property
    def least(self) -> int:
        """How many tokens a prompt needs for one to be located; a rule of one's own is taken at its word."""
        return 0 if self.endless else 2 if self.first and self.last else 1

    def sides(self) -> tuple["Positions", ...]:
        """The prefix and the suffix apart, or the rule itself where it has only one of them."""
        if not (self.first and self.last):
            return (self,)
        return replace(self, side="prefix"), replace(self, side="suffix")

    def locate(self, prompt: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Return the located tokens of a batch.

        Args:
            prompt: `[batch, tokens]`, true where a token belongs to the prompt, false for padding and for an answer.
            input_ids: `[batch, tokens]`, for a rule of one's own.

        Returns:
            A mask of the same shape. For `all` it covers the prompt; the tokens after it belong to it as well.
        """
        if self.whole:
            return prompt
        if self.own:
            located = _OWN[self.own](prompt, input_ids)
            if not isinstance(located, Tensor) or located.shape != prompt.shape or located.dtype != torch.bool:
                came = f"{list(located.shape)} of {located.dtype}" if isinstance(located, Tensor) else repr(located)
                raise ReftError(
                    f"the rule {self.own!r} must return a bool mask of the shape {list(prompt.shape)} "
                    f"([batch, tokens]), got {came}.",
                    setting="positions",
                )
            return located & prompt
        rank = prompt.long().cumsum(-1)
        length = rank[:, -1:]
        first, last = torch.full_like(length, self.first), torch.full_like(length, self.last)
        if self.first and self.last:
            first, last = torch.minimum(first, length // 2), torch.minimum(last, length // 2)
        prefix, suffix = prompt & (rank <= first), prompt & (rank > length - last)
        if self.side == "prefix":
            return prefix
        return suffix if self.side == "suffix" else prefix | suffix


def prompt_tokens(tokens: Tensor, labels: Tensor | None = None, prompt_lengths: Tensor | None = None) -> Tensor:
    """Return which tokens belong to the prompt, `[batch, tokens]`.

    Args:
        tokens: `[batch, tokens]`, true for tokens of the text, false for padding.
        labels: `[batch, tokens]` with -100 where there is no loss: the prompt ends before the first label. A row
            whose first token has one is a text without a prompt of its own: all of it counts.
        prompt_lengths: `[batch]`, how many tokens of the text are the prompt; it goes before the labels.
            Without either, the whole text is the prompt.
    """
    if prompt_lengths is not None:
        return tokens & (tokens.long().cumsum(-1) <= prompt_lengths.to(tokens.device).view(-1, 1))
    if labels is not None:
        prompt = tokens & ((labels != IGNORED).to(tokens.device).long().cumsum(-1) == 0)
        return torch.where(prompt.any(-1, keepdim=True), prompt, tokens)
    return tokens


def _nearest(text: str) -> str:
    """A hint for rules that people write by analogy."""
    digits = re.search(r"\d+", text)
    if text.startswith("last"):
        return f" Did you mean 'l{digits[0] if digits else 1}'?"
    if text.startswith("first"):
        return f" Did you mean 'f{digits[0] if digits else 1}'?"
    if re.fullmatch(r"0*[1-9]\d{0,8}", text):
        return f" Did you mean 'l{int(text)}'?"
    swapped = re.fullmatch(r"l(\d+)\+f(\d+)", text)
    if swapped:
        return f" Did you mean 'f{swapped[2]}+l{swapped[1]}'?"
    return did_you_mean(text, ("prompt", "all", "f1+l1", "l1", "f1"))
