"""What stands before the routes: keys, and bodies that are too large, too slow or no JSON."""

import asyncio
import hmac
import json
from collections.abc import Iterable
from typing import Any

from ...errors import ReftError
from .faults import Fault

OPEN = ("/", "/health", "/page/")  # what needs no key


class Keys:
    """Who may ask, and for what.

    Args:
        given: `"KEY"` for all models, or `"KEY=NAME,NAME"` for these alone; none lets everyone in.

    Raises:
        ReftError: a key that is empty, given twice, not of plain characters or with a = in it, or one for no model.
    """

    def __init__(self, given: Iterable[str] = ()) -> None:
        self._known: dict[bytes, frozenset[str] | None] = {}
        for entry in given:
            key, equals, names = entry.partition("=")
            allowed = frozenset(name for name in names.split(",") if name) if equals else None
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ReftError("expected KEY or KEY=NAME,NAME, of plain characters.", setting="api_key")
            if key.encode() in self._known:
                raise ReftError("a key is given twice; name all its models at once.", setting="api_key")
            if allowed is not None and (not allowed or any(name.startswith("=") for name in allowed)):
                raise ReftError(
                    "a key names no model behind its =; leave this out for all models, and choose a key without one.",
                    setting="api_key",
                )
            self._known[key.encode()] = allowed

    def allowed(self, header: str | None) -> frozenset[str] | None:
        """Return the models that the bearer of an `Authorization` header may ask, none for all.

        Raises:
            Fault: no key, or one that is not known.
        """
        if not self._known:
            return None
        kind, _, key = (header or "").partition(" ")
        given = key.strip().encode(errors="replace")
        found = [known for known in self._known if hmac.compare_digest(known, given)]  # all, in constant time
        if kind.lower() != "bearer" or not found:
            raise Fault(401, "Expected a valid API key: Authorization: Bearer KEY.", code="invalid_api_key")
        return self._known[found[0]]


class Guard:
    """An ASGI middleware. Puts the models that a client may ask into the request's state, as `allowed`.

    Args:
        app: the routes.
        keys: who may ask.
        limit: of a body, in bytes.
        seconds: in which a body has to come.
    """

    def __init__(self, app: Any, *, keys: Keys, limit: int, seconds: float = 30.0) -> None:
        self.app, self.keys, self.limit, self.seconds = app, keys, limit, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if scope["path"] not in OPEN and not scope["path"].startswith(OPEN[-1]):
                scope.setdefault("state", {})["allowed"] = self.keys.allowed(headers.get("authorization"))
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await asyncio.wait_for(self._read(headers, receive), self.seconds)
                if body is None:  # the client has gone
                    return None
                receive = _replay(body, receive)
        except TimeoutError:
            fault = Fault(408, f"The body did not come within {self.seconds:g} seconds.", code="timeout")
        except Fault as error:
            fault = error
        else:
            return await self.app(scope, receive, send)
        text = json.dumps(fault.body()).encode()
        about = {"content-type": "application/json", "content-length": str(len(text)), "connection": "close"}
        pairs = [(name.encode(), value.encode()) for name, value in {**about, **fault.headers}.items()]
        await send({"type": "http.response.start", "status": fault.status, "headers": pairs})
        await send({"type": "http.response.body", "body": text})

    async def _read(self, headers: dict[str, str], receive: Any) -> bytes | None:
        """The body, none if the client goes before it is here."""
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # a page of another origin can send others without being asked
            raise Fault(415, f"Expected a body of the type application/json, got {kind[:80]!r}.")
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise Fault(415, f"Expected a body without a content-encoding, got {coding[:80]!r}.")
        told = headers.get("content-length", "0")
        parts, size, more = [], 0, True
        while more:
            if size > self.limit or (told.isdecimal() and int(told[:20]) > self.limit):
                raise Fault(413, f"The body is larger than {self.limit} bytes.")
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > self.limit:
            raise Fault(413, f"The body is larger than {self.limit} bytes.")
        return b"".join(parts)


def _replay(body: bytes, receive: Any) -> Any:
    """Give a body once more, and then whatever comes, such as that the client goes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again
