"""Where the code of a callable comes from: its module, looked at through methods, partials and wrappers."""

import functools
import types
from collections.abc import Iterator
from typing import Any


def functions_of(value: Any) -> Iterator[Any]:
    """The functions that a callable is made of, from the outermost: those it is bound to, calls or wraps.

    What says of itself that it wraps another function is followed; what it encloses otherwise is not.
    """
    seen: list[Any] = []
    while value is not None and not any(value is one for one in seen):
        seen.append(value)
        inner = getattr(value, "__wrapped__", None)
        if isinstance(value, types.MethodType):
            value, inner = value.__func__, None
            continue
        if isinstance(value, functools.partial):
            yield from functions_of(value.func)
        else:
            yield value
        value = inner


def module_of(function: Any) -> str:
    """The name of the module whose code this is; a wrapper may say that it is of the module of what it wraps."""
    known = getattr(function, "__globals__", None)
    return str(known.get("__name__", "")) if known is not None else str(getattr(type(function), "__module__", ""))
