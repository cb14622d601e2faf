"""A replica that computes with vLLM: the server of `pyreft serve --engine vllm`."""

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from typing import Any

from ...loading import EMBEDDED
from ..vllm.launch import prepare
from ..vllm.private import server_figures, server_within
from .replica import Replica

_log = logging.getLogger(__name__)
SECONDS = 0.5  # between two looks at the engine


class VllmReplica(Replica):
    """See `Replica`. When its engine ends, so does its process, and Ray starts another.

    Args:
        options: what it is made of, `FleetOptions`.

    Raises:
        ReftError: one of the options cannot work.
    """

    async def __init__(self, options: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        self._within = AsyncExitStack()
        words, variables, _ = await asyncio.to_thread(
            prepare,
            options.model,
            options.name or options.model or EMBEDDED,
            options.adapters,
            slots=options.slots,
            rank=options.rank,
            store=options.store,
            more=["--max-num-seqs", str(options.rows), *options.vllm],
        )
        os.environ.update(variables)
        app, self.engine = await self._within.enter_async_context(server_within(words))
        super().__init__(app, options.slots)
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while not self.engine.errored:
            await asyncio.sleep(SECONDS)
        _log.error("the engine has ended, and so does this replica")
        os._exit(1)  # who waits for an answer is told by Ray that it will not come

    def read_figures(self) -> bytes:
        return server_figures()

    async def check_health(self) -> None:
        """Have Ray replace a replica that no longer answers."""
        await self.engine.check_health()

    async def __del__(self) -> None:
        """Ray has waited for the requests that run; the rest gets an error."""
        if (watching := getattr(self, "_watching", None)) is not None:
            watching.cancel()
        await self._within.aclose()
