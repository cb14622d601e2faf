"""The door of a fleet: checks keys and bodies, reads which model is asked for, and passes bytes on, both ways."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..api.faults import Fault
from ..api.guard import Guard, Keys
from ..api.listening import Options, make_catalog
from ..catalog import Catalog
from ..laptop.scheduling import LATE
from .figures import together
from .passing import Passed, plain_scope, prompt_text
from .replica import Message

_log = logging.getLogger(__name__)
SECONDS = 5.0  # between two looks at the adapters' names
READING = 10.0  # seconds for the figures of all replicas
ONE_PLACE = "The replicas of a fleet share a directory or URL: put adapters there, or take them away."
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)


def make_gate(options: Options, replicas: str) -> Starlette:
    """Return the application that stands before the replicas of a deployment of this application of Ray's."""
    handle = serve.get_deployment_handle(replicas, app_name=serve.get_replica_context().app_name)
    gate = Gate(handle, make_catalog(options, SECONDS), options.timeout)
    app = Starlette(routes=[Route("/{path:path}", gate)])
    app.add_middleware(Guard, keys=Keys(options.api_key), limit=int(options.max_body * 2**20))
    return app


class Gate:
    """Sends each request to a replica, one that holds its adapter if there is one, and its answer back.

    Args:
        handle: of the replicas' deployment.
        catalog: the adapters' names, for nothing else.
        seconds: for which a request may wait for the begin of its answer.
    """

    def __init__(self, handle: Any, catalog: Catalog, seconds: float) -> None:
        self.handle, self.catalog, self.seconds = handle.options(stream=True), catalog, seconds
        self._all = handle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if (own := OWN.get(scope["path"])) is not None:
            return await (await own(self, scope))(scope, receive, send)
        body = await Request(scope, receive).body()
        fields = _fields(body)
        passed = Passed(plain_scope(scope), body, prompt_text(fields))
        handle = self.handle
        if await asyncio.to_thread(self.catalog.__contains__, fields.get("model")):
            handle = handle.options(multiplexed_model_id=fields["model"])
        answer = handle.answer.remote(passed)
        try:
            try:
                held = await asyncio.wait_for(_beginning(answer), self.seconds)
            except Exception as error:
                return await _told(_fault(error))(scope, receive, send)
            await self._pass_on(held, answer, send)
        finally:
            answer.cancel()

    async def _figures(self, scope: Any) -> Response:
        """Those of all replicas, for those who may ask all models."""
        if scope["state"]["allowed"] is not None:
            return _told(Fault(403, "This key is for its models alone."))
        try:
            told = await self._all.broadcast("figures").results_async(timeout_s=READING, return_exceptions=True)
        except Exception as error:
            return _told(_fault(error))
        known = [one for one in told if not isinstance(one, BaseException)]  # the others have just gone
        return Response(together(known), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _by_hand(self, scope: Any) -> Response:
        return _told(Fault(404, ONE_PLACE))

    async def _pass_on(self, held: list[Message], answer: AsyncIterator[Message], send: Any) -> None:
        headers = dict(held[0]["headers"])
        for message in held:
            await send(message)
        try:
            async for message in answer:
                await send(message)
        except LOST as error:
            _log.warning("a replica went in the midst of an answer: %s", error)
            if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                raise  # the connection is cut: a part is no whole
            text = b"data: " + json.dumps(_fault(error).body()).encode() + b"\n\n"  # and no [DONE]
            await send({"type": "http.response.body", "body": text, "more_body": False})


OWN = {
    "/metrics": Gate._figures,
    "/v1/load_adapter": Gate._by_hand,
    "/v1/unload_adapter": Gate._by_hand,
}


def _told(fault: Fault) -> Response:
    return JSONResponse(fault.body(), fault.status, fault.headers)


async def _beginning(answer: AsyncIterator[Message]) -> list[Message]:
    """The first of an answer: its status is sent only together with a body."""
    return [await anext(answer), await anext(answer)]


def _fields(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # which the replica says to the client
        return {}
    return found if isinstance(found, dict) else {}


def _fault(error: Exception) -> Fault:
    if isinstance(error, BackPressureError):
        again = {"Retry-After": "1"}
        return Fault(429, "Too many requests wait; ask again later.", code="queue_full", headers=again)
    if isinstance(error, TimeoutError):
        return Fault(504, LATE, code="timeout")
    if isinstance(error, LOST):
        again = {"Retry-After": "1"}
        return Fault(503, "The server that answered has gone; ask again.", code="replica_lost", headers=again)
    _log.error("a request failed", exc_info=error)
    return Fault(500, "The server could not do this; its log says why.", code="internal_error")
