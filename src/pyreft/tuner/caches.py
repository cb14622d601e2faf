"""What a model keeps of passed tokens, by the names under which models take and return it.

transformers calls it `cache` from 5.24 on; before, and in models written for it, its name says what it holds.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(module: nn.Module) -> str:
    """By which name a module's forward takes keys and values."""
    return "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"


def cache_of(values: Any) -> Any:
    """The keys and values, or the recurrent states, of the tokens that have passed; none where there are none.

    Args:
        values: arguments of a forward, or what it returned; a tuple does not name what it holds.
    """
    if not hasattr(values, "get") or serves_requests(values):  # whose cache is that of all requests
        return None
    for name in NAMES:
        if (cache := values.get(name)) is not None:
            return cache
    return None


def counts(cache: Any) -> bool:
    """Whether a cache knows how many tokens have passed; recurrent states alone do not."""
    layers = getattr(cache, "layers", None)
    return not layers or hasattr(layers[0], "get_seq_length") or any(hasattr(one, "get_seq_length") for one in layers)


def is_empty(cache: Any) -> bool:
    """Whether no token has passed; so it is where there is no cache."""
    return cache is None or not (cache.get_seq_length() if counts(cache) else cache.has_previous_state())


def serves_requests(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward is one of continuous batching, see `continuous.Batches`."""
    return "read_index" in arguments and arguments.get("cache") is not None
