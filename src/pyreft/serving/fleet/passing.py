"""A request of HTTP on its way from the gate to a replica, as plain values."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Passed:
    """A request, whole.

    Args:
        scope: what is kept of ASGI's: plain values.
        body: of the request.
        prompt: what it asks, as text; Ray's `PrefixCacheAffinityRouter` goes by it, and no other.
    """

    scope: dict[str, Any]
    body: bytes
    prompt: str


_KEPT = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


def plain_scope(scope: dict[str, Any]) -> dict[str, Any]:
    """What of ASGI's scope can be sent: the request itself, nothing of the server that took it."""
    kept = {name: scope[name] for name in _KEPT if name in scope}
    return kept | {"headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]]}


def prompt_text(body: dict[str, Any]) -> str:
    """The texts of a body in their order; never empty."""
    texts = []
    rest = [body.get(name) for name in ("input", "prompt", "messages", "instructions")]  # the last comes first
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            rest += [value.get("text"), value.get("content")]
        elif isinstance(value, list):
            rest += reversed(value)
    return "\n".join(texts) or "-"
