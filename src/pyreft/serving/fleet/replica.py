"""One server of a fleet, asked by Ray instead of a socket."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from .passing import Passed

Message = dict[str, Any]
WHICH = b"x-reft-replica"  # a header of every answer


class Replica:
    """A base model with adapters in slots, and the routes of its server.

    Args:
        app: the routes.
        slots: of its engine.
    """

    def __init__(self, app: Any, slots: int) -> None:
        self.app = app

        async def hold(name: str) -> str:
            return name  # the server loads and replaces adapters itself; Ray is told who was here last

        self._which = serve.get_replica_context().replica_id.unique_id
        self._hold = serve.multiplexed(max_num_models_per_replica=slots)(hold)

    async def answer(self, passed: Passed) -> AsyncIterator[Message]:
        """Yield what the server says, as messages of ASGI. Whoever stops to listen is a client that has gone."""
        if name := serve.get_multiplexed_model_id():
            await self._hold(name)
        told: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting: list[Message] = [{"type": "http.request", "body": passed.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.create_task(self.app(dict(passed.scope), receive, told.put))
        answering.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (message := await told.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (WHICH, self._which.encode())]
                yield message
            await answering
        finally:
            gone.set()

    async def figures(self) -> tuple[str, str]:
        """Which replica this is, and its figures as Prometheus reads them."""
        return self._which, self.read_figures().decode()

    def read_figures(self) -> bytes:
        """Those of its server."""
        raise NotImplementedError
