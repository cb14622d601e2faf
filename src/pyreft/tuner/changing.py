"""One change of adapters at a time: threads that add, load, delete or save some would mix up what they make.

Calls of models do not wait. A change leaves the dicts of modules that they go through as they are, and puts others in
their place.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

_CHANGING = threading.RLock()  # of all models: a lock of its own would be in the way of a model's copies


def one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method wait until no other thread changes adapters."""

    @functools.wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _CHANGING:
            return method(*args, **kwargs)

    return alone
