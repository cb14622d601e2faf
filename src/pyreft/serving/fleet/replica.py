"""One server of a fleet: that of `pyreft serve`, asked by Ray instead of a socket."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from ..api.app import make_app
from ..api.guard import Keys
from ..api.listening import Options, make_service
from .passing import Passed

Message = dict[str, Any]
WHICH = b"x-reft-replica"  # a header of every answer


class Replica:
    """A base model with adapters in slots, and the routes of its server.

    Args:
        options: what it is made of.

    Raises:
        ReftError: one of the options cannot work.
    """

    def __init__(self, options: Options) -> None:
        self.service = make_service(options)
        self.app = make_app(self.service, Keys(options.api_key), body=int(options.max_body * 2**20))

        async def hold(name: str) -> str:
            return name  # the server loads and replaces adapters itself; Ray is told who was here last

        self._which = serve.get_replica_context().replica_id.unique_id.encode()
        self._hold = serve.multiplexed(max_num_models_per_replica=options.slots)(hold)
        self.service.engine.start()

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
                    message["headers"] = [*message["headers"], (WHICH, self._which)]
                yield message
            await answering
        finally:
            gone.set()

    def check_health(self) -> None:
        """Have Ray replace a replica that no longer answers."""
        if not self.service.engine.scheduler.alive:
            raise RuntimeError("the scheduler has ended")

    def __del__(self) -> None:
        """Ray has waited for the requests that run; the rest gets an error."""
        if (service := getattr(self, "service", None)) is not None:
            service.ending = True
            service.engine.stop()
