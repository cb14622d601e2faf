"""The one exception that users of pyreft need to know, and the hint it gives for a mistyped name."""

import difflib
from collections.abc import Iterable


class ReftError(ValueError):
    """Something given to pyreft cannot work; the message says what was expected, what came, and what to do."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
