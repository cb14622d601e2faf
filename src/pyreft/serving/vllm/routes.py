"""The routes that vLLM's server gets: models with their adapters, and adapters loaded and unloaded by hand.

Loading lets a request name a path of the server's, so both are there only with `PYREFT_ALLOW_LOADING=1`.
"""

import asyncio
import os
import time
from typing import Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.responses import JSONResponse

from ...errors import ReftError
from ..api.faults import not_served, unknown_model
from ..catalog import Catalog, StoreError
from .front import Front, catalog_of, served_name

ALLOW = "PYREFT_ALLOW_LOADING"
WEEK = 7 * 24 * 3600.0


class ReftRoutes:
    """An endpoint plug-in of vLLM, to be named in `VLLM_PLUGINS`."""

    name = "reft"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the front behind vLLM's check of API keys."""
        app.add_middleware(Front)
        router = APIRouter()
        router.get("/v1/models")(list_models)
        router.get("/v1/models/{name:path}")(show_model)
        router.get("/v1/adapters")(list_adapters)
        router.post("/v1/load_adapter")(load_adapter)
        router.post("/v1/unload_adapter")(unload_adapter)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Look at the adapters once, so that a wrong directory ends the start."""
        state.reft_engine = engine_client
        catalog = catalog_of(state)
        await asyncio.to_thread(catalog.store.prune, WEEK)
        await asyncio.to_thread(catalog.names)


async def list_models(request: Request) -> JSONResponse:
    """The base model and every adapter."""
    return JSONResponse(await _models(request))


async def show_model(name: str, request: Request) -> JSONResponse:
    """One model, as the list has it."""
    for model in (await _models(request))["data"]:
        if model["id"] == name:
            return JSONResponse(model)
    fault = unknown_model(f"The model {name[:200]!r} does not exist.")
    return JSONResponse(fault.body(), fault.status)


async def _models(request: Request) -> dict[str, Any]:
    state = request.app.state
    models = (await state.openai_serving_models.show_available_models()).model_dump()
    base = models["data"][0]
    names = await asyncio.to_thread(catalog_of(state).names)
    models["data"] += [{**base, "id": name, "root": name, "parent": base["id"]} for name in names]
    return models


async def list_adapters(request: Request) -> JSONResponse:
    """Each adapter's name and digest, or why it is refused; and what the workers have in their slots.

    One at a URL that nobody has asked for has no digest yet.
    """
    state = request.app.state
    described = await asyncio.to_thread(_describe, catalog_of(state))
    workers = await state.reft_engine.collective_rpc("reft_stats")
    for entry in described:
        entry["on_device"] = all(entry.get("digest") in worker["slots"] for worker in workers)
    return JSONResponse({"adapters": described, "workers": workers})


def _describe(catalog: Catalog) -> list[dict[str, Any]]:
    found = []
    for name in catalog.names():
        try:
            adapter = catalog.peek(name)
            found.append({"name": name} | ({} if adapter is None else {"digest": adapter.digest}))
        except KeyError:  # it has gone just now
            continue
        except (ReftError, OSError) as error:
            found.append({"name": name, "error": str(error)})
    return found


async def load_adapter(request: Request, adapter_name: str = Body(), adapter_path: str = Body()) -> JSONResponse:
    """Give a name to an adapter's directory."""
    if (refused := _refused(request)) is not None:
        return refused
    if adapter_name == served_name(request.app.state):
        return _error(400, f"adapter_name: {adapter_name!r} is the base model's name.")
    try:
        adapter = await asyncio.to_thread(catalog_of(request.app.state).load, adapter_name, adapter_path)
    except StoreError as error:
        fault = not_served(adapter_name, error)
        return JSONResponse(fault.body(), fault.status, fault.headers)
    except (ReftError, OSError) as error:
        return _error(400, str(error))
    return JSONResponse({"name": adapter_name, "digest": adapter.digest, "created": int(time.time())})


async def unload_adapter(request: Request, adapter_name: str = Body(embed=True)) -> JSONResponse:
    """Take a name away; running requests end as they began."""
    if (refused := _refused(request)) is not None:
        return refused
    catalog = catalog_of(request.app.state)
    try:
        digest = (await asyncio.to_thread(catalog.resolve, adapter_name)).digest
    except (KeyError, ReftError):
        digest = None
    try:
        await asyncio.to_thread(catalog.unload, adapter_name)
    except KeyError:
        return _error(404, catalog.unknown(adapter_name))
    if digest is not None:
        await request.app.state.reft_engine.collective_rpc("reft_drop", args=(digest,))
    return JSONResponse({"name": adapter_name})


def _refused(request: Request) -> JSONResponse | None:
    if os.environ.get(ALLOW) != "1":
        return _error(403, f"Adapters are loaded and unloaded by hand only where the server runs with {ALLOW}=1.")
    if (getattr(request.app.state.args, "api_server_count", None) or 1) > 1:
        return _error(501, "Several API servers cannot load by hand; put the adapter into their directory.")
    return None


def _error(status: int, text: str) -> JSONResponse:
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": status}}, status)
