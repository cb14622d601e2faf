"""`"model": name` over HTTP: a request that names an adapter becomes one for the base model with the adapter's digest.

Stands behind vLLM's own check of API keys and before its routes. A client chooses by name alone: whatever else it says
of adapters is taken out of its request.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ...errors import ReftError
from ..api.faults import Fault, not_served
from ..catalog import Catalog, Store
from .flags import KEY, STRENGTH, Settings, check_adapter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LIMIT = 64 * 2**20  # bytes of a request's body
EXTRAS = ("vllm_xargs", "extra_args")  # where a body may hold a request's extra arguments
# paths at which a request's `vllm_xargs` are heard, and whose answers hold the model's name
ANSWERS = (
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"),
    "/invocations",
)
SAME = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")  # paths at which all models answer the same


def catalog_of(state: Any) -> Catalog:
    """The names of a server, by the state of its app."""
    if not hasattr(state, "reft_catalog"):
        settings = Settings.of(state.vllm_config)
        state.reft_catalog = Catalog(
            settings.adapters, Store(settings.store), lambda adapter: check_adapter(adapter, state.vllm_config)
        )
    return state.reft_catalog


def served_name(state: Any) -> str:
    """The name under which the base model is served."""
    return state.openai_serving_models.base_model_paths[0].name


class Front:
    """An ASGI middleware that maps names to digests, and back in the answers."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        kinds = [value for name, value in scope["headers"] if name == b"content-type"] or [b""]
        kind = kinds[0].split(b";")[0].strip().lower()  # the first, as vLLM reads it
        if kind != b"application/json" and not kind.endswith(b"+json"):
            return await self.app(scope, receive, send)
        body = await _read(receive)
        if body is None:  # the client has gone
            return None
        if len(body) > LIMIT:
            return await _refuse(send, Fault(413, f"The request is larger than {LIMIT} bytes."))
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):  # vLLM reads it the same way, and says so
            return await self.app(scope, _replay(body, receive), send)
        name, path = None, scope["path"].removeprefix(scope.get("root_path", ""))
        if isinstance(data, dict):
            strip(data)
            state = scope["app"].state
            try:
                name = await self._choose(state, data, path)
            except Fault as fault:
                return await _refuse(send, fault)
            body = json.dumps(data).encode()
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        if name is not None and path in ANSWERS:
            send = _Renamed(send, served_name(state), name)
        return await self.app(scope, _replay(body, receive), send)

    async def _choose(self, state: Any, data: dict[str, Any], path: str) -> str | None:
        """Put the digest of the adapter that a body names into it; return the name, none for any other model.

        Raises:
            Fault: an adapter that cannot be served, now or at all, or not in this way.
        """
        name = data.get("model")
        strength = data.pop(STRENGTH, None)
        if not isinstance(name, str) or name == served_name(state):
            return None
        try:
            adapter = await asyncio.to_thread(catalog_of(state).resolve, name)
        except KeyError:
            return None  # vLLM answers that there is no such model
        except (ReftError, OSError) as error:
            raise not_served(name, error) from None
        if path not in (*ANSWERS, *SAME):
            raise Fault(400, f"{path} knows no adapters; ask the base model there.", "model")
        if data.get("use_beam_search"):
            told = "use_beam_search: beams cannot have an adapter; sample, or ask the base model."
            raise Fault(400, told, "use_beam_search")
        extra = data.get("vllm_xargs")
        data["model"] = served_name(state)
        data["vllm_xargs"] = {**(extra if isinstance(extra, dict) else {}), KEY: adapter.digest}
        if strength is not None:
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) < 1e6:
                raise Fault(400, f"{STRENGTH}: expected a number, got {strength!r}.", STRENGTH)
            data["vllm_xargs"][STRENGTH] = float(strength)
        return name


def strip(data: dict[str, Any]) -> None:
    """Take out of a body, in place, what a client says of adapters other than by the model's name."""
    holders = [holder for holder in (data, data.get("sampling_params")) if isinstance(holder, dict)]
    for holder in holders:
        for name in EXTRAS:
            if isinstance(extra := holder.get(name), dict):
                for key in [key for key in extra if key.startswith(KEY)]:
                    del extra[key]


class _Renamed:
    """Sends on an answer, or a stream of them, under the adapter's name instead of the base model's."""

    def __init__(self, send: Send, old: str, new: str) -> None:
        self.send, self.old, self.new = send, old, new
        self.start: Message | None = None
        self.stream = False
        self.rest = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.stream = kind.startswith(b"text/event-stream")
            self.start = message
            if self.stream:
                await self.send(message)
            return
        if message["type"] != "http.response.body":
            return await self.send(message)
        self.rest += message.get("body", b"")
        more = message.get("more_body", False)
        if not self.stream:
            if not more:
                await self._whole()
            return
        lines = self.rest.split(b"\n")
        self.rest = lines.pop() if more else b""
        body = b"".join(self._line(line) + b"\n" for line in lines)
        if not more and body:
            body = body[:-1]  # the text ended without a line of its own
        await self.send({**message, "body": body})

    async def _whole(self) -> None:
        assert self.start is not None
        body = self._json(self.rest)
        headers = [pair for pair in self.start["headers"] if pair[0] != b"content-length"]
        await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _line(self, line: bytes) -> bytes:
        return b"data: " + self._json(line[6:]) if line.startswith(b"data: {") else line

    def _json(self, text: bytes) -> bytes:
        try:
            data = json.loads(text)
        except ValueError:
            return text
        if not isinstance(data, dict):
            return text
        changed = False
        for holder in (data, data.get("response"), data.get("message")):
            if isinstance(holder, dict) and holder.get("model") == self.old:
                holder["model"], changed = self.new, True
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() if changed else text


async def _read(receive: Receive) -> bytes | None:
    parts, size, more = [], 0, True
    while more and size <= LIMIT:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read once more, and then whatever comes, such as that the client goes."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, fault: Fault) -> None:
    """Answer with an error as the OpenAI API has it."""
    body = json.dumps(fault.body()).encode()
    about = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
    headers = [(name.lower().encode(), value.encode()) for name, value in about.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
