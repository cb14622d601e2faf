"""What is asked of the engine, and what it tells of each answer while it grows."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..served import Adapter
from .sampling import Choice, Sampling

_numbers = itertools.count()


@dataclass(frozen=True)
class Piece:
    """What has become known of one answer."""

    index: int  # of the answer, among those of its request
    text: str  # that is new and certain
    choice: Choice | None = None  # the token that was chosen; none at an end without one
    finish: str | None = None  # "stop" or "length" at the end, "timeout" or "error" where there is none
    problem: str = ""  # what went wrong, then


@dataclass(eq=False)
class Request:
    """One prompt, to be answered `n` times.

    Args:
        prompt: its token ids.
        deliver: takes each `Piece` in the scheduler's thread; must return at once.
        adapter: none for the base model.
        strength: by which the adapter's edits are multiplied.
        most: the most tokens of an answer.
        ends: the tokens that end one.
        stop: the texts that end one.
        told_prompt: the number of likeliest tokens to tell for each token of the prompt, none for nothing of it; they
            are in `prompt_choices` before the first piece.
        deadline: a time of `time.monotonic` at which it is given up.
    """

    prompt: list[int]
    deliver: Callable[[Piece], None]
    adapter: Adapter | None = None
    strength: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    most: int = 16
    ends: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    told_prompt: int | None = None
    deadline: float = float("inf")
    number: int = field(default_factory=lambda: next(_numbers))
    came: float = field(default_factory=time.monotonic)
    prompt_choices: list[Choice] = field(default_factory=list)  # of the prompt's tokens from the second on
    gone: bool = False  # whether nobody waits for it any more

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer have at most."""
        return len(self.prompt) + self.most
