"""A fleet from its arguments, as `serve run` or a file of Ray Serve's gives them."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from ray import serve

from ...errors import ReftError, did_you_mean
from ..api.guard import Keys
from ..api.listening import Options, make_catalog
from .gate import make_gate
from .with_transformers import TransformersReplica
from .with_vllm import VllmReplica

NOT_HERE = {
    "host": "set it in Ray Serve's http_options",
    "port": "set it in Ray Serve's http_options",
    "allow_loading": "replicas share a directory or URL; put adapters there",
}
OF_TRANSFORMERS = ("dtype", "cache", "max_prompt", "max_tokens")
# what vLLM's server in a replica has no use for, and what is to be said instead
NOT_FOR_VLLM = {
    "--host": "host",
    "--port": "port",
    "--uds": "port",
    "--api-key": "api_key",
    "--served-model-name": "name",
    "--max-num-seqs": "rows",
    "--api-server-count": "max_replicas",
    "--headless": "max_replicas",
    "--ssl-keyfile": "port",
    "--ssl-certfile": "port",
}


@dataclass(frozen=True)
class FleetOptions(Options):
    """What a fleet is made of.

    Args:
        min_replicas, max_replicas: how many servers there are; between the two, as many as the requests ask for.
        gpus: of each.
        engine: what computes in a replica, transformers or vllm.
        vllm: further arguments of vLLM's server, as words or as text.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: Sequence[str] = ()
    min_replicas: int = 1
    max_replicas: int = 1
    gpus: float = 0


ARGUMENTS = [field.name for field in fields(FleetOptions) if field.name not in NOT_HERE]


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for Ray Serve.

    What is not an argument is set as for every deployment of Ray Serve, by the names `Replica` and `Gate`: such as the
    delays of the autoscaler, or another router.

    Args:
        args: fields of `FleetOptions`, as they are or as text. `api_key` may hold several with spaces between, and
            stands in `$PYREFT_API_KEY` otherwise.

    Raises:
        ReftError: an argument that is not known, or that cannot work.
    """
    options = _read(args)
    Keys(options.api_key)
    make_catalog(options)
    replicas = serve.deployment(VllmReplica if options.engine == "vllm" else TransformersReplica).options(
        name="Replica",
        max_ongoing_requests=options.rows,  # who waits, waits at the gate, and for any replica
        max_queued_requests=options.queue,
        graceful_shutdown_timeout_s=30,
        ray_actor_options={"num_gpus": options.gpus},
        **_scaling(options),
    )

    def make() -> Any:
        return make_gate(options, "Replica")

    waiting = options.queue + options.rows * options.max_replicas
    gate = serve.deployment(serve.ingress(make)()).options(
        name="Gate", max_ongoing_requests=2 * waiting, graceful_shutdown_timeout_s=30, ray_actor_options={"num_cpus": 0}
    )
    return gate.bind(replicas.bind(options))


def _scaling(options: FleetOptions) -> dict[str, Any]:
    if options.min_replicas == options.max_replicas:
        return {"num_replicas": options.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": max(1, options.rows * 3 // 4),
        }
    }


def _read(args: dict[str, Any]) -> FleetOptions:
    for name in args:
        if name in NOT_HERE:
            raise ReftError(f"is not for a fleet: {NOT_HERE[name]}.", setting=name)
        if name not in ARGUMENTS:
            raise ReftError(f"{name!r} is not known.{did_you_mean(name, ARGUMENTS)}")
    given = dict(args)
    keys = given.get("api_key", os.environ.get("PYREFT_API_KEY", ""))
    given["api_key"] = keys.split() if isinstance(keys, str) else keys
    if isinstance(words := given.get("vllm", ()), str):
        given["vllm"] = shlex.split(words)
    try:
        options = TypeAdapter(FleetOptions).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ReftError(f"{first['msg']}, got {first['input']!r}.", setting=str(first["loc"][0])) from None
    for name in ("min_replicas", "rows", "queue", "slots"):
        if getattr(options, name) < 1:
            raise ReftError(f"expected 1 or more, got {getattr(options, name)}.", setting=name)
    if options.max_replicas < options.min_replicas:
        raise ReftError(f"expected {options.min_replicas} or more, got {options.max_replicas}.", setting="max_replicas")
    _check_engine(options)
    return options


def _check_engine(options: FleetOptions) -> None:
    """Refuse what the other engine takes, and what is the fleet's."""
    if options.engine != "vllm":
        if options.vllm:
            raise ReftError(f"{options.vllm[0]!r} is for the engine vllm.", setting="engine")
        return
    default = FleetOptions()
    for name in OF_TRANSFORMERS:
        if getattr(options, name) != getattr(default, name):
            raise ReftError("is for the engine transformers; vLLM has arguments of its own.", setting=name)
    if any("=" in key for key in options.api_key):
        raise ReftError("keys for some models are for the engine transformers.", setting="api_key")
    for word in options.vllm:
        if (own := NOT_FOR_VLLM.get(word.split("=")[0].replace("_", "-"))) is not None:
            raise ReftError(f"{word}: a fleet has one of its own; set {own}.", setting="vllm")
