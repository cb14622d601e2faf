"""A server of its own process: listens, and ends in order when it is told to."""

from collections.abc import Mapping
from typing import Any

import uvicorn

from ...loading import load_base
from ..catalog import Catalog, Store
from ..laptop.engine import Engine
from .app import make_app
from .guard import Keys
from .service import Limits, Service

WEEK = 7 * 24 * 3600.0


class Server(uvicorn.Server):
    """Uvicorn's, which lets what runs come to its end before it goes.

    Args:
        app: the routes.
        service: what answers.
        host, port: where to listen.
        grace: for how many seconds requests may go on once the server is told to end.
    """

    def __init__(self, app: Any, service: Service, *, host: str, port: int, grace: float = 30.0) -> None:
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=max(1, int(grace)), lifespan="off"
        )
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and begin to answer."""
        self.service.engine.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no further requests, wait for those that run, and end."""
        self.service.ending = True
        await super().shutdown(sockets)
        self.service.engine.stop()


def make_server(options: Mapping[str, Any]) -> Server:
    """Load a base model and return the server for it.

    Args:
        options: those of the command, by their names.

    Raises:
        ReftError: one of them cannot work.
    """
    keys = Keys(options["api_key"] or ())
    store = Store(options["store"])
    catalog = Catalog(options["adapters"], store)
    store.prune(WEEK)
    model, tokenizer = load_base(options["model"], options["dtype"])
    engine = Engine(
        model,
        tokenizer,
        slots=options["slots"],
        rank=options["rank"] or catalog.rank(),
        rows=options["rows"],
        queue=options["queue"],
        cache=options["cache"],
    )
    catalog.check = engine.check
    limits = Limits(prompt=options["max_prompt"], tokens=options["max_tokens"], seconds=options["timeout"])
    service = Service(engine, catalog, options["name"], limits)
    app = make_app(service, keys, body=int(options["max_body"] * 2**20), loading=options["allow_loading"])
    return Server(app, service, host=options["host"], port=options["port"])
