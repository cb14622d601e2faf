"""A call of an adapted model: what it gave, what was found for it, and what is edited in it at this moment.

A call is held by the thread that makes it, never by the model: calls in several threads, and calls within calls, do not
see each other. Layers, rules and modules are not known here.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from .located import Key, Located, Tokens

# what a call may give, beside what the model itself takes
LOCATIONS, LENGTHS, SUBSPACES, STRENGTH = "intervention_locations", "prompt_lengths", "subspaces", "strength"
GIVEN = (LOCATIONS, LENGTHS, SUBSPACES, STRENGTH)


class Reading(NamedTuple):
    """The tokens that a forward reads of one stack, `rows` times `tokens`, after so many that are `past`."""

    rows: int
    tokens: int
    past: int
    located: Located
    at: dict[Key, Tokens]  # those to edit now
    adapters: dict[str, list[str]]  # of each row, where they are several, by the name of their group
    strengths: dict[str, list[float]]  # of these adapters, or of the one that all rows share


class Surroundings:
    """What a thread asks of a call that begins within them.

    Args:
        edits: of the model that is called.
        row_adapters: an adapter for each row.
        off: the base model alone.
        labels: of the rows, for calls that are given none.
    """

    def __init__(
        self, edits: Any, *, row_adapters: list[str] | None = None, off: bool = False, labels: Tensor | None = None
    ) -> None:
        self.edits, self.row_adapters, self.off, self.labels = edits, row_adapters, off, labels


class Call:
    """One call of a model, from its beginning to its end; a generation is one, with many forwards.

    Args:
        edits: of the model that is called.
        given: what the call gives, by the names in `GIVEN`, and its `labels`.
        enabled: for each layer that was edited when it began, by its number, the adapters that act there.
        row_adapters: the adapter of each row, where each has its own.
        strengths: of the adapters, where it is not 1.
    """

    def __init__(
        self,
        edits: Any,
        given: dict[str, Any],
        enabled: list[list[str]],
        row_adapters: list[str] | None,
        strengths: dict[str, float],
    ) -> None:
        self.edits, self.given, self.enabled, self.row_adapters = edits, given, enabled, row_adapters
        self.active = list(dict.fromkeys(name for names in enabled for name in names))  # as they are summed
        self._strengths = strengths
        self.entered: list[int] = []  # the entries whose forward runs, from the outermost
        self.left: list[tuple[int, str | None]] = []  # those whose forward ran within the one that runs
        self.gone = 0  # how many adapters had been deleted when it began
        self.readings: dict[str, Reading | None] = {}  # by stack; none: only the states say how many tokens there are
        self.rotations: dict[Any, Tensor] = {}  # R of the layers that need it, `[r, d]`
        self.rotated: set[Key] = set()  # the representations for which R has been computed
        self.stacked: dict[tuple, Any] = {}  # interventions that rows with adapters of their own share
        self.asked: set[Key] = set()  # the representations that had tokens to edit
        self.reached: set[int] = set()  # the numbers of the layers that have edited
        self.located: Located | None = None  # of the whole prompt, in a generation; of every forward, while `serving`
        self.serving = self.generating = False
        self.off = False  # whether it is one of the base model alone
        # whether the inputs of its steps are prepared, so that a step is told from another call; and those of the next
        self.prepares = self.prepared = False
        self.passed = 0  # of a generation: how many tokens its steps have read
        self.behind: Any = None  # and the cache with which one began behind all located tokens
        self.started: Located | None = None  # and of what a decoder began with, where no cache remembers it
        self.is_forward = self.trains = False  # whether it is one forward, and that for training
        self.height = 0  # of the stack of what runs, below a call that is one forward

    def enabled_at(self, number: int) -> list[str]:
        """The adapters that act at a layer; none where nothing was edited when the call began."""
        return self.enabled[number] if number < len(self.enabled) else []

    def read(self, stack: str, located: Located, rows: int, tokens: int, past: int) -> Reading:
        """Note what the forward that runs reads, and return it.

        Args:
            stack: whose tokens they are.
            located: where they are edited.
        """
        at = {} if past >= located.until else located.within(past, tokens, rows)
        self.asked.update(at)
        names = dict.fromkeys(name for name, _ in at)
        adapters = {name: located.adapters(name, rows) if located.groups else [] for name in names}
        strengths = {name: [self.strength(one) for one in own or [name]] for name, own in adapters.items()}
        reading = Reading(rows, tokens, past, located, at, adapters, strengths)
        self.readings[stack] = reading
        return reading

    def strength(self, name: str) -> float:
        """What an adapter's edits are multiplied by."""
        given = self.given.get(STRENGTH, 1.0)
        return self._strengths.get(name, 1.0) * float(given.get(name, 1.0) if isinstance(given, dict) else given)

    def again(self) -> "Call":
        """Another call with the same edits at the same tokens, in which nothing has run yet."""
        other = Call(self.edits, dict(self.given), self.enabled, self.row_adapters, self._strengths)
        other.generating, other.located = self.generating, self.located
        other.gone, other.off = self.gone, self.off
        return other


class _Running(threading.local):
    def __init__(self) -> None:  # in each thread
        self.frames: list[Surroundings | Call] = []
        self.announced: list[tuple[Any, Any]] = []  # entries, and their modules, whose forward has yet to begin


running = _Running()
"""What runs in this thread, the innermost last. The lists are only ever changed in place: `torch.compile`, where it has
to break a graph, loses what is assigned to a thread's attributes, and keeps what is done to a list."""


def innermost(edits: Any) -> Surroundings | Call | None:
    """What runs of a model in this thread now."""
    for frame in reversed(running.frames):
        if frame.edits is edits:
            return frame
    return None


@contextmanager
def within(*frames: Surroundings | Call) -> Iterator[None]:
    """Run something in a call, or in what surrounds calls; whatever it leaves running is gone in the end."""
    stack = running.frames
    count, announced = len(stack), len(running.announced)
    stack.extend(frames)
    try:
        yield
    finally:
        del running.announced[announced:]
        if stack[count : count + len(frames)] == list(frames):
            stack[count:] = [one for one in stack[count + len(frames) :] if isinstance(one, Surroundings)]
        else:  # one that began before has ended before, as asyncio's tasks may
            stack[:] = [one for one in stack if one not in frames]
