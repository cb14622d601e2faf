"""What became of the rows of a file: how many there were, and those that are wrong, all told at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ReftError

OnError = Literal["stop", "skip"]
LongRows = Literal["refuse", "cut", "skip"]
_SHOWN = 10


def listed_fields(counts: Mapping[str, int]) -> str:
    """Names of fields with how many rows have them, in words."""
    return ", ".join(f"{name or 'a column without a name'} ({count:,})" for name, count in counts.items())


@dataclass
class Tally:
    """The count of a file's rows, filled while it is read.

    Args:
        on_error: whether wrong rows stop what is done with the others in the end, or are left out.
    """

    on_error: OnError = "stop"
    rows: int = 0
    errors: list[ReftError] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)  # the rows that these are of; one may have several
    unread: dict[str, int] = field(default_factory=dict)  # fields that mean nothing here, with how many rows have them
    cut: int = 0  # rows that were too long
    skipped: int = 0  # rows that were too long

    @contextmanager
    def watch(self, row: str) -> Iterator[None]:
        """Note an error of a row, which is named by its place, instead of raising it."""
        try:
            yield
        except ReftError as error:
            self.wrong.add(row)
            self.errors.append(error)

    def check(self) -> None:
        """Tell of the wrong rows.

        Raises:
            ReftError: of one row, its own; of several, the first ten of them; none, if they are to be left out.
        """
        if not self.errors or self.on_error == "skip":
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        raise ReftError(
            f"{len(self.wrong):,} of {self.rows:,} rows are wrong; mend them, or leave them out with `on_error` skip:"
            f"\n{self.listed()}",
            also=[*self.also, "on_error"],
        )

    @property
    def also(self) -> set[str]:
        """The settings that the errors name, see `ReftError`."""
        return {name for error in self.errors for name in error.also}

    def fields(self) -> str:
        """The fields that mean nothing here, with how many rows have them."""
        return listed_fields(self.unread)

    def listed(self) -> str:
        """The first ten wrong rows, a line for each."""
        lines = [f"  {error}" for error in self.errors[:_SHOWN]]
        if len(self.errors) > _SHOWN:
            lines.append(f"  ... and {len(self.errors) - _SHOWN:,} more")
        return "\n".join(lines)
