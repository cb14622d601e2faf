"""`pyreft serve`: the OpenAI API for a base model and its adapters."""

import os
import shlex
import socket
from pathlib import Path
from typing import Annotated

import typer

from pyreft_cli.console import console, hush
from pyreft_cli.options import Quiet

Option = typer.Option


def serve(
    context: typer.Context,
    adapters: Annotated[
        Path, Option(help="A directory whose folders are the adapters; each is served under its folder's name.")
    ],
    model: Annotated[
        str | None, Option(help="Base model: a hub id or a directory; by default the embedded one.")
    ] = None,
    name: Annotated[str | None, Option(help="What clients call the base model.  [default: as in --model]")] = None,
    engine: Annotated[str, Option(help="What computes: vllm.")] = "vllm",
    host: Annotated[str, Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, Option(help="The port to listen at.", min=1, max=65535)] = 8000,
    slots: Annotated[int, Option(help="Adapters on the device at once; more wait their turn.", min=1)] = 64,
    rank: Annotated[
        int | None, Option(help="The greatest rank of an adapter.  [default: that of those in the directory]", min=1)
    ] = None,
    store: Annotated[
        Path | None, Option(help="Where copies of adapters are kept.  [default: the user's cache]")
    ] = None,
    allow_loading: Annotated[
        bool, Option("--allow-loading", help="Let clients load and unload adapters by path: for trusted clients alone.")
    ] = False,
    show: Annotated[bool, Option("--print", help="Print the command of vLLM instead of running it.")] = False,
    quiet: Quiet = False,
) -> None:
    """Serve a base model and its adapters over the OpenAI API: "model" in a request names the adapter.

    What stands after -- goes to vLLM's server, as in: pyreft serve --adapters DIR -- --max-model-len 4096.
    """
    hush()
    from pyreft.errors import ReftError
    from pyreft.serving.catalog import Catalog, default_store
    from pyreft.serving.vllm import launch
    from pyreft.serving.vllm.flags import Settings

    if engine != "vllm":
        raise ReftError(f"expected vllm, got {engine!r}.", setting="engine")
    launch.check_installed()
    found = Catalog(adapters).names()
    settings = Settings(
        adapters=str(adapters.resolve()),
        slots=slots,
        rank=rank or Catalog(adapters).rank(),
        store=str((store or default_store()).absolute()),
    )
    more = ["--host", host, "--port", str(port), "--served-model-name", name or model or "pocket", *context.args]
    command = [launch.base_path(model), *launch.vllm_arguments(settings, launch.architecture_of(model), more)]
    variables = launch.environment(settings) | ({"PYREFT_ALLOW_LOADING": "1"} if allow_loading else {})
    if show:
        words = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
        print(" ".join([*words, "vllm serve", *map(shlex.quote, command)]))
        return
    check_port(host, port)
    if not quiet:
        count = f"{len(found)} adapter{'' if len(found) == 1 else 's'}"
        console.print(f"Serving {name or model or 'pocket'} and {count} of {adapters} at http://{host}:{port}/v1")
    program = launch.server_command()
    os.execve(program[0], [*program, *command], {**os.environ, **variables})


def check_port(host: str, port: int) -> None:
    """Refuse a port at which another program listens, before a model is loaded."""
    from pyreft.errors import ReftError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ReftError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another.", setting="port"
            ) from None
