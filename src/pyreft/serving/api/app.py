"""The routes of the OpenAI API, the few of our own, and the page."""

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ...data.encode import token_texts
from ...errors import ReftError
from ..catalog import StoreError
from ..laptop.requests import Piece
from ..laptop.requests import Request as Work
from .bodies import ChatBody, CompletionBody, LoadBody, LocateBody, ResponseBody, UnloadBody
from .completing import ChatWriting, CompletionWriting
from .faults import Fault, not_served, unknown_model
from .guard import Guard, Keys
from .responding import ResponseWriting, messages_of, tools_of
from .service import Asked, Service

PAGE = Path(__file__).parents[1] / "page"
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"


def make_app(service: Service, keys: Keys, *, body: int = 8 * 2**20, loading: bool = False) -> FastAPI:
    """Return the server's routes.

    Args:
        service: what answers.
        keys: who may ask.
        body: the most bytes of a request's body.
        loading: let clients load and unload adapters by path.
    """
    version = importlib.metadata.version("pyreft")
    app = FastAPI(title="pyreft", version=version, docs_url=None, redoc_url=None)  # their pages load foreign scripts
    app.state.service = service
    app.add_middleware(Guard, keys=keys, limit=body)
    app.add_exception_handler(Fault, _tell)
    app.add_exception_handler(ReftError, _tell)
    app.add_exception_handler(RequestValidationError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(UnicodeEncodeError, _tell)
    app.add_exception_handler(Exception, _tell)
    app.post("/v1/chat/completions")(chat)
    app.post("/v1/completions")(complete)
    app.post("/v1/responses")(respond)
    app.post("/v1/located_tokens")(locate)
    app.get("/v1/models")(list_models)
    app.get("/v1/models/{name:path}")(show_model)
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    if loading:
        app.post("/v1/load_adapter")(load_adapter)
        app.post("/v1/unload_adapter")(unload_adapter)
    app.get("/", include_in_schema=False)(show_page)
    app.mount("/page", StaticFiles(directory=PAGE))
    return app


async def _tell(_: Request, error: Exception) -> Response:
    """Any error, as the OpenAI API has it."""
    if isinstance(error, RequestValidationError):
        error = _field_fault(error)
    elif isinstance(error, ReftError):
        error = Fault(400, str(error), error.setting)
    elif isinstance(error, UnicodeEncodeError):
        error = Fault(400, "A text has half of a character in it (a lone surrogate), which no text may.")
    elif isinstance(error, HTTPException):
        error = Fault(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    elif not isinstance(error, Fault):
        error = Fault(500, "The server could not do this; its log says why.", code="internal_error")
    return JSONResponse(error.body(), error.status, error.headers)


# of the errors of a field that takes several types, the one that tells most; 2 are all others
_TELLING = {"literal_error": 0, "extra_forbidden": 1, "string_type": 3, "int_type": 3, "list_type": 3}


def _field_fault(error: RequestValidationError) -> Fault:
    first = min(error.errors(), key=lambda one: _TELLING.get(one["type"], 2))
    if first["type"] == "json_invalid":
        return Fault(400, "The body is no valid JSON.")
    path = [str(part)[:80] for part in first["loc"][1:] if isinstance(part, int) or not part[:1].isupper()]
    param = ".".join(part for part in path if "[" not in part and part not in ("str", "int")) or None
    if first["type"] == "extra_forbidden":
        return Fault(400, f"{param}: this server does not support it; leave it out.", param, "unsupported_parameter")
    text = first["msg"].removeprefix("Value error, ")
    return Fault(400, f"{param}: {text}." if param else f"{text}.", param)


class _Stream(StreamingResponse):
    """Events of an answer; when they end, or their client goes, whatever still runs is let go."""

    def __init__(self, events: AsyncIterator[bytes], asked: Asked) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._asked = asked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.end()


async def _answered(asked: Asked, work: list[Work], writing: Callable[[], Any], stream: bool | None) -> Response:
    """Have requests answered; an error before the first token is one of HTTP in a stream, too."""
    asked.submit(work)
    try:
        writer = writing()
        if not stream:
            whole = await writer.answer()
            asked.end()
            return JSONResponse(whole) if asked.outcome == "done" else Response(status_code=499)  # nobody is there
        pieces = asked.pieces()
        first = await anext(pieces, None)
    except BaseException:
        asked.end()
        raise

    async def again() -> AsyncIterator[tuple[int, Piece]]:
        if first is not None:
            yield first
            async for piece in pieces:
                yield piece

    return _Stream(writer.events(again()), asked)


async def chat(body: ChatBody, http: Request) -> Response:
    """A turn of a chat."""
    service: Service = http.app.state.service
    asked = Asked(service, http, body.model)

    def prepare() -> list[Work]:
        adapter = service.adapter(body.model, http.state.allowed)
        tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        return [service.request(body, service.chat_prompt(body.messages, tools), adapter, asked.deliver(0))]

    work = await asyncio.to_thread(prepare)
    return await _answered(asked, work, lambda: ChatWriting(asked, body, service.engine.tokenizer), body.stream)


async def complete(body: CompletionBody, http: Request) -> Response:
    """Completions of one or several prompts, texts or token ids."""
    service: Service = http.app.state.service
    asked = Asked(service, http, body.model)

    def prepare() -> list[Work]:
        adapter = service.adapter(body.model, http.state.allowed)
        given: Any = body.prompt
        prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        count = body.n or 1
        if len(prompts) > service.engine.scheduler.queue:
            raise ReftError(f"expected at most {service.engine.scheduler.queue} prompts.", setting="prompt")
        return [
            service.request(body, service.prompt_of(prompt), adapter, asked.deliver(number * count))
            for number, prompt in enumerate(prompts)
        ]

    work = await asyncio.to_thread(prepare)
    return await _answered(asked, work, lambda: CompletionWriting(asked, body, service.engine.tokenizer), body.stream)


async def respond(body: ResponseBody, http: Request) -> Response:
    """A response to turns of a chat, or to what came of a call."""
    service: Service = http.app.state.service
    asked = Asked(service, http, body.model)

    def prepare() -> list[Work]:
        adapter = service.adapter(body.model, http.state.allowed)
        prompt = service.chat_prompt(messages_of(body), tools_of(body))
        return [service.request(body, prompt, adapter, asked.deliver(0))]

    work = await asyncio.to_thread(prepare)
    return await _answered(asked, work, lambda: ResponseWriting(asked, body), body.stream)


async def locate(body: LocateBody, http: Request) -> JSONResponse:
    """The tokens of a prompt, and which of them the adapter edits."""
    service: Service = http.app.state.service

    def find() -> dict[str, Any]:
        adapter = service.adapter(body.model, http.state.allowed)
        if body.messages is not None and body.prompt is None:
            ids = service.chat_prompt(body.messages)
        elif body.prompt is not None and body.messages is None:
            ids = service.prompt_of(body.prompt)
        else:
            raise ReftError("expected either messages or a prompt.", setting="messages")
        spans = [] if adapter is None else [span for own in adapter.row(0, len(ids)).spans for span in own]
        edited = [any(a <= at and (b is None or at < b) for a, b in spans) for at in range(len(ids))]
        answers = any(b is None for _, b in spans)
        tokens = token_texts(service.engine.tokenizer, ids)
        listed = [{"token": token, "edited": flag} for token, flag in zip(tokens, edited, strict=True)]
        return {"object": "list", "model": body.model, "tokens": listed, "answer_edited": answers}

    return JSONResponse(await asyncio.to_thread(find))


async def list_models(http: Request) -> JSONResponse:
    """The base model and every adapter that the client may ask."""
    service: Service = http.app.state.service
    names = await asyncio.to_thread(service.names, http.state.allowed)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})


async def show_model(name: str, http: Request) -> JSONResponse:
    """One model."""
    service: Service = http.app.state.service
    if name not in await asyncio.to_thread(service.names, http.state.allowed):
        raise unknown_model(f"The model {name[:200]!r} does not exist.")
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    parent = None if name == service.name else service.name
    about = {"id": name, "object": "model", "created": service.began, "owned_by": "pyreft"}
    return {**about, "root": name, "parent": parent, "max_model_len": service.engine.context}


async def health(http: Request) -> JSONResponse:
    """Whether requests are answered."""
    service: Service = http.app.state.service
    good = service.engine.scheduler.alive and not service.ending
    return JSONResponse({"status": "ok" if good else "ends"}, 200 if good else 503)


def _check_for_all(http: Request) -> None:
    if http.state.allowed is not None:
        raise Fault(403, "This key is for its models alone.")


async def metrics(http: Request) -> Response:
    """Figures for Prometheus; for those who may ask all models."""
    _check_for_all(http)
    return Response(http.app.state.service.gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def load_adapter(body: LoadBody, http: Request) -> JSONResponse:
    """Give a name to an adapter's directory on the server."""
    service: Service = http.app.state.service
    _check_for_all(http)
    if body.adapter_name == service.name:
        raise ReftError(f"{body.adapter_name!r} is the base model's name.", setting="adapter_name")
    try:
        adapter = await asyncio.to_thread(service.catalog.load, body.adapter_name, body.adapter_path)
    except StoreError as error:
        raise not_served(body.adapter_name, error) from None
    except (OSError, ValueError) as error:  # such as a path that cannot be
        raise error if isinstance(error, ReftError) else ReftError(str(error), setting="adapter_path") from None
    return JSONResponse({"name": body.adapter_name, "digest": adapter.digest})


async def unload_adapter(body: UnloadBody, http: Request) -> JSONResponse:
    """Take a name away; what runs with it goes on to its end."""
    service: Service = http.app.state.service
    _check_for_all(http)
    try:
        await asyncio.to_thread(service.catalog.unload, body.adapter_name)
    except KeyError:
        raise unknown_model(service.catalog.unknown(body.adapter_name)) from None
    return JSONResponse({"name": body.adapter_name})


async def show_page() -> FileResponse:
    """The page for people."""
    headers = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
    return FileResponse(PAGE / "index.html", headers=headers)
