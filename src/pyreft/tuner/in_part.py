"""What computes the calls of a model in this thread in its place: `reach`, a training step in part."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Compute = Callable[[Callable[..., Any], dict[str, Any]], Any]  # from the ordinary call and its arguments to its output


class InPart(threading.local):
    """What computes the calls of each thread, by the tuner of the model that is called."""

    entries: tuple[tuple[Any, Compute | None], ...] = ()  # the innermost last

    def of(self, tuner: Any) -> Compute | None:
        """What computes a model's calls now; None if it does so itself."""
        return next((compute for one, compute in reversed(self.entries) if one is tuner), None)

    @contextmanager
    def by(self, tuner: Any, compute: Compute | None) -> Iterator[None]:
        """Let something compute the calls of a model, or with None the model itself."""
        entry = tuner, compute
        self.entries = (*self.entries, entry)
        try:
            yield
        finally:  # in another thread, if the one that entered has ended, there is nothing to take back
            self.entries = tuple(one for one in self.entries if one is not entry)


in_part = InPart()
