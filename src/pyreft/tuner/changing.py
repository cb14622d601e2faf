"""One change of a model's adapters at a time: threads that add, delete or save some would mix up what they make.

A change is one in memory: nobody waits while files are read, or while a save waits for its directory. Calls of models
wait for none of it but the moment in which other adapters become active. A change leaves the dicts of modules that
calls go through as they are, and puts others in their place.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

# of all models: a lock of its own would be in the way of a model's copies
changing = threading.RLock()
switching = threading.RLock()  # taken within `changing`, if at all


def one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method wait until no other thread changes adapters."""

    @functools.wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with changing:
            return method(*args, **kwargs)

    return alone
