"""`pyreft serve`: the OpenAI API for a base model and its adapters."""

import os
import shlex
import signal
import socket
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from pyreft_cli.console import console, hush
from pyreft_cli.options import Quiet

Option = typer.Option
ENGINES = ("transformers", "vllm")
# what an engine takes that the other does not, with the defaults by which it is seen that nobody asked for it
OF_TRANSFORMERS = {
    "dtype": "auto",
    "api_key": None,
    "rows": 16,
    "queue": 64,
    "cache": 4.0,
    "max_prompt": None,
    "max_tokens": None,
    "max_body": 8.0,
    "timeout": 600.0,
    "replicas": 1,
}


def serve(
    context: typer.Context,
    adapters: Annotated[
        str | None,
        Option(help="A directory or URL whose folders are the adapters, by their names.  [default: the embedded ones]"),
    ] = None,
    model: Annotated[
        str | None, Option(help="Base model: a hub id, a directory, or smollm2.  [default: the embedded one]")
    ] = None,
    name: Annotated[str | None, Option(help="What clients call the base model.  [default: as in --model]")] = None,
    engine: Annotated[str, Option(help="What computes: transformers or vllm.")] = "transformers",
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
    dtype: Annotated[str, Option(help="float32, bfloat16, float16; auto is float32 on a CPU.")] = "auto",
    api_key: Annotated[
        list[str] | None,
        Option(help="KEY for all models or KEY=NAME,NAME for these; may be repeated.", envvar="PYREFT_API_KEY"),
    ] = None,
    rows: Annotated[int, Option(help="Answers that grow at once.", min=1)] = 16,
    queue: Annotated[int, Option(help="Requests that may wait.", min=1)] = 64,
    cache: Annotated[float, Option(help="Memory for keys and values, in GiB.", min=0.001)] = 4.0,
    max_prompt: Annotated[int | None, Option(help="The most tokens of a prompt.", min=1)] = None,
    max_tokens: Annotated[int | None, Option(help="The most tokens of an answer.", min=1)] = None,
    max_body: Annotated[float, Option(help="The most of a request's body, in MiB.", min=0.001)] = 8.0,
    timeout: Annotated[float, Option(help="Seconds that a request may take.", min=0.1)] = 600.0,
    replicas: Annotated[int, Option(help="Servers behind one address, on Ray: pyreft[ray].", min=1)] = 1,
    quiet: Quiet = False,
) -> None:
    """Serve a base model and its adapters over the OpenAI API, and a page: "model" in a request names the adapter.

    With --engine vllm, what stands after -- goes to vLLM's server, as in: -- --max-model-len 4096.
    """
    from pyreft.errors import ReftError, did_you_mean

    options: dict[str, Any] = dict(context.params)
    if engine not in ENGINES:
        expected = " or ".join(ENGINES)
        raise ReftError(f"expected {expected}, got {engine!r}.{did_you_mean(engine, ENGINES)}", setting="engine")
    hush()
    options["name"] = name or model or "pocket"
    how = serve_fleet if replicas > 1 else serve_with_vllm if engine == "vllm" else serve_here
    how(options, context.args)


def serve_here(options: dict[str, Any], more: list[str]) -> None:
    """Serve from this process, on transformers."""
    from pyreft.errors import ReftError

    check_for_transformers(options, more)
    try:
        from pyreft.serving.api.listening import Options, make_server
    except ModuleNotFoundError as error:
        raise ReftError(f"{error.name} is not installed; pip install 'pyreft[serve]' brings it.") from None
    names = [field.name for field in fields(Options)]
    given = {name: options[name] for name in names} | {"api_key": options["api_key"] or ()}
    server = make_server(Options(**given))
    tell(options, server.service.catalog.names())
    server.run()


def serve_fleet(options: dict[str, Any], more: list[str]) -> None:
    """Serve from several processes of this machine, on Ray."""
    from pyreft.errors import ReftError

    check_for_fleet(options, more)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to others
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # none of its threads starts it again at the end
    try:
        import ray
        from ray import serve as fleet

        from pyreft.serving.fleet.application import ARGUMENTS, build
    except ModuleNotFoundError as error:
        raise ReftError(f"{error.name} is not installed; pip install 'pyreft[ray]' brings it.") from None
    import torch

    count, gpus = options["replicas"], torch.cuda.device_count()
    if 0 < gpus < count:
        raise ReftError(f"expected {gpus} at most, one on each GPU, got {count}.", setting="replicas")
    args = {name: options[name] for name in ARGUMENTS if name in options} | {
        "api_key": options["api_key"] or (),
        "vllm": more,
    }
    application = build(args | {"min_replicas": count, "max_replicas": count, "gpus": min(gpus, 1)})
    told = threading.Event()
    ray.init(
        "local",
        num_cpus=max(count, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
    )
    fleet.start(http_options={"host": options["host"], "port": options["port"]})
    for number in (signal.SIGTERM, signal.SIGINT):  # in place of Ray's, which ends a process within three seconds
        signal.signal(number, lambda *_: told.set())
    try:
        fleet.run(application, name="pyreft")
        tell(options, None)
        told.wait()
    except RuntimeError as error:
        raise ReftError(f"the replicas could not start: {error}") from None
    finally:
        with suppress(TimeoutError):
            fleet.delete("pyreft")  # what runs has half a minute to end, which `shutdown` does not give it
        fleet.shutdown()
        ray.shutdown()


def check_for_fleet(options: dict[str, Any], more: list[str]) -> None:
    """Refuse what no fleet can do, or not on its engine."""
    from pyreft.errors import ReftError
    from pyreft.serving.vllm import launch

    if options["engine"] == "vllm":
        if options["show"]:
            raise ReftError("is for a single server; a fleet has no command of vLLM's.", setting="print")
        check_port(options["host"], options["port"])
        launch.check_installed()
    else:
        check_for_transformers(options, more)
    if options["allow_loading"]:
        raise ReftError("is for a single server: replicas share a directory or URL.", setting="allow_loading")


def check_for_transformers(options: dict[str, Any], more: list[str]) -> None:
    """Refuse what is vLLM's alone, and a port that is taken."""
    from pyreft.errors import ReftError

    if more or options["show"]:
        raise ReftError(f"{more[0] if more else '--print'!r} is for --engine vllm.", setting="engine")
    check_port(options["host"], options["port"])


def serve_with_vllm(options: dict[str, Any], more: list[str]) -> None:
    """Become vLLM's server."""
    from pyreft.errors import ReftError
    from pyreft.serving.vllm import launch

    asked = [option for option, default in OF_TRANSFORMERS.items() if (options[option] or None) != default]
    if asked:
        raise ReftError("is for --engine transformers; vLLM has options of its own, behind --.", setting=asked[0])
    command, variables, catalog = launch.prepare(
        options["model"],
        options["name"],
        options["adapters"],
        slots=options["slots"],
        rank=options["rank"],
        store=options["store"],
        more=["--host", options["host"], "--port", str(options["port"]), *more],
    )
    variables |= {"PYREFT_ALLOW_LOADING": "1"} if options["allow_loading"] else {}
    if options["show"]:
        words = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
        print(" ".join([*words, "vllm serve", *map(shlex.quote, command)]))
        return
    check_port(options["host"], options["port"])
    tell(options, catalog.names())
    program = launch.server_command()
    os.execve(program[0], [*program, *command], {**os.environ, **variables})


def tell(options: dict[str, Any], names: list[str] | None) -> None:
    """Say what is served where, the adapters' number if it is known."""
    if options["quiet"]:
        return
    host, port = options["host"], options["port"]
    place = f"[{host}]" if ":" in host else host
    count = "adapters" if names is None else f"{len(names)} adapter{'' if len(names) == 1 else 's'}"
    console.print(f"Serving {options['name']} and {count} at http://{place}:{port}/v1", markup=False)
    if options["engine"] != "vllm":
        console.print(f"A page to chat with them: http://{place}:{port}/", markup=False)
        if host not in ("127.0.0.1", "::1", "localhost") and not options["api_key"]:
            console.print("Whoever reaches this address may ask: there is no --api-key.")


def check_port(host: str, port: int) -> None:
    """Refuse a port at which another program listens, before a model is loaded."""
    from pyreft.errors import ReftError

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ReftError(f"cannot listen at {host}:{port} ({error.strerror}); choose another.", setting="port") from None
