"""What goes wrong with a request, as the OpenAI API tells it."""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from ...errors import ReftError
from ..catalog import StoreError

_log = logging.getLogger(__name__)


@dataclass
class Fault(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: of HTTP.
        message: what was expected, what came, what to do.
        param: the field of the request that it is about.
        code: a word that programs look for.
        headers: of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # half of a character in two, which JSON may hold, cannot be sent on
        message = self.message.encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def unknown_model(message: str) -> Fault:
    """No model has the name that a request asks for."""
    return Fault(404, message, "model", "model_not_found")


def not_served(name: str, error: ReftError | OSError) -> Fault:
    """What a client is told of an adapter that cannot be served, now or at all: without the server's paths."""
    _log.warning("%s: %s", name, error)
    if isinstance(error, ReftError):
        told = re.sub(r"(?<![^\s'(])/\S+(?=: )", repr(name), str(error))
        return Fault(400, told, "model", "adapter_refused")
    again = {"Retry-After": "5"}
    if isinstance(error, StoreError):
        cause = error.__cause__
        why = (cause.strerror if isinstance(cause, OSError) else None) or "its disk cannot be reached"
        told = f"The server's store cannot take {name!r} now: {why}. Adapters that are in it are answered."
        return Fault(503, told, "model", "store_cannot_take", again)
    told = f"The files of {name!r} cannot be reached now; ask again later."
    return Fault(503, told, "model", "adapter_unreachable", again)
