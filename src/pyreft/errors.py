"""The one exception that users of pyreft need to know, and what it says of a mistyped name or a value of no use."""

import difflib
import errno
import math
import reprlib
from collections.abc import Iterable, Mapping

_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # no room, a limit of a file, a quota
# as libraries say it that write in Rust or C++; torch names no cause when a part of a file cannot be written
_FULL_TEXTS = ("No space left", "File too large", "Disk quota", "os error 28", "PytorchStreamWriter failed")
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "fields"}


class ReftError(ValueError):
    """Something given to pyreft cannot work; the message says what was expected, what came, and what to do.

    Args:
        problem: the message, without the names that are written before it.
        setting: the argument or setting that it is about.
        where: the file or command that the setting stands in, if that helps to find it.
        also: further settings that the message names, in quotes.

    >>> error = ReftError("expected a number above 0, got -1.", setting="lr", where="train.yaml")
    >>> str(error)
    'train.yaml: lr: expected a number above 0, got -1.'
    >>> error.setting
    'lr'
    """

    def __init__(
        self, problem: str, *, setting: str | None = None, where: str | None = None, also: Iterable[str] = ()
    ) -> None:
        self.problem, self.setting, self.where, self.also = problem, setting, where, tuple(also)
        super().__init__(self.told({}))  # what a pickle is made again of, beside the attributes

    def told(self, names: Mapping[str, str]) -> str:
        """The message with other names for some of its settings, such as `--rank` for `rank`."""
        problem = self.problem
        for name in self.also:
            for quote in "`'":
                quoted = f"{quote}{name}{quote}"
                problem = problem.replace(quoted, names.get(name, quoted))
        setting = names.get(self.setting, self.setting) if self.setting else None
        return ": ".join(part for part in (self.where, setting, problem) if part)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk has no room for a file."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__
    return False


def check_type(name: str, value: object, *kinds: type) -> None:
    """Refuse a value of another type, such as one that stands in a file; whole numbers count as numbers, too.

    Args:
        name: what it is the value of, with its file or place if it has one.
        kinds: `str`, `bool`, `int`, `float`, `list` or `dict`; a number has to be finite.

    Raises:
        ReftError: naming what was expected and what came.
    """
    finite = not isinstance(value, float) or math.isfinite(value)
    for kind in kinds:
        fits = isinstance(value, (int, float) if kind is float else kind)
        if fits and finite and (kind is bool or not isinstance(value, bool)):
            return
    expected = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
    raise ReftError(f"expected {expected}, got {reprlib.repr(value)}.", setting=name)
