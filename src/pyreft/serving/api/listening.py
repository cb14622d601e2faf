"""A server of its own process: listens, and ends in order when it is told to."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from ... import pocket
from ...errors import ReftError
from ...loading import EMBEDDED, load_base
from ..catalog import Catalog, Store
from ..laptop.engine import Engine
from .app import make_app
from .guard import Keys
from .service import Limits, Service

WEEK = 7 * 24 * 3600.0
_KEPT = 75  # seconds; clients keep an idle connection for 5, proxies for 60: the one who closes it should be they


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
            app,
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=max(1, int(grace)),
            timeout_keep_alive=_KEPT,
            lifespan="off",
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


@dataclass(frozen=True)
class Options:
    """What a server is made of.

    Args:
        adapters: a directory or URL whose folders are the adapters, none for those of the embedded model.
        model: a base model, none for the embedded one.
        name: what clients call it, by default as here.
        dtype: of its weights, see `load_base`.
        host, port: where to listen; port 0 is any that is free.
        slots, rows, queue, cache: see `Engine`.
        rank: the greatest rank of an adapter, by default that of those in the directory.
        store: where copies of adapters are kept, by default in the user's cache.
        api_key: who may ask, see `Keys`.
        allow_loading: let clients load and unload adapters by path.
        max_prompt, max_tokens: of a request; none for what the model takes.
        max_body: of a request, in MiB.
        timeout: seconds that a request may take.
    """

    adapters: Path | str | None = None
    model: str | None = None
    name: str | None = None
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 64
    rank: int | None = None
    rows: int = 16
    queue: int = 64
    cache: float = 4.0
    store: Path | None = None
    api_key: Sequence[str] = ()
    allow_loading: bool = False
    max_prompt: int | None = None
    max_tokens: int | None = None
    max_body: float = 8.0
    timeout: float = 600.0


def make_catalog(options: Options, seconds: float | None = None) -> Catalog:
    """Return the adapters' names; see `Catalog` for `seconds`.

    Raises:
        ReftError: there is no such place.
    """
    if options.adapters is None and options.model not in (None, EMBEDDED):
        raise ReftError("expected a directory whose folders are the adapters.", setting="adapters")
    return Catalog(options.adapters or pocket.adapters(), Store(options.store), seconds=seconds)


def make_service(options: Options) -> Service:
    """Load a base model and return what answers with it, once its engine is started.

    Raises:
        ReftError: one of the options cannot work.
    """
    catalog = make_catalog(options)
    catalog.store.prune(WEEK)
    model, tokenizer = load_base(options.model, options.dtype)
    engine = Engine(
        model,
        tokenizer,
        slots=options.slots,
        rank=options.rank or catalog.rank(),
        rows=options.rows,
        queue=options.queue,
        cache=options.cache,
    )
    catalog.check = engine.check
    limits = Limits(prompt=options.max_prompt, tokens=options.max_tokens, seconds=options.timeout)
    return Service(engine, catalog, options.name or options.model or EMBEDDED, limits)


def make_server(options: Options) -> Server:
    """Load a base model and return the server for it.

    Raises:
        ReftError: one of the options cannot work.
    """
    keys = Keys(options.api_key)
    service = make_service(options)
    app = make_app(service, keys, body=int(options.max_body * 2**20), loading=options.allow_loading)
    return Server(app, service, host=options.host, port=options.port)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serve from a thread within a `with` block; gives the server's address."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ReftError(f"cannot listen at {server.config.host}:{server.config.port}.", setting="port")
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
