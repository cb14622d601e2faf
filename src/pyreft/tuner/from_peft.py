"""A LoRA of PEFT as edits: its pairs of matrices, one for each linear layer. Which tokens, others say."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..errors import ReftError
from ..interventions import LoraIntervention
from .values import check_values

POSITIONS = "reft_positions"  # what a located LoRA says beside the fields of PEFT

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# by which PEFT computes something else than h + (α/r) B A x, or more
_OTHERWISE = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("target_parameters", "alora_invocation_tokens", "use_bdlora", "arrow_config", "velora_config", "kasa_config"),
    "monteclora_config",
)


@dataclass(frozen=True)
class Lora:
    """A LoRA as it is in its files.

    Args:
        edits: by the path of the linear layer.
        positions: the rule of a located one.
        base_model, task_type: as PEFT has them.
    """

    edits: dict[str, LoraIntervention]
    positions: str | None
    base_model: str | None
    task_type: str | None


def read_lora(path: str | os.PathLike) -> Lora:
    """Read a LoRA of PEFT.

    Args:
        path: its directory, or its name on the hub.

    Raises:
        ReftError: no LoRA, a damaged one, or one that computes something else than h + (α/r) B A x.
    """
    place = _find(path)
    config = _read_config(place, path)
    try:
        tensors = load_peft_weights(str(place), device="cpu")
    except Exception as error:  # by whatever library
        raise ReftError(f"{path}: the weights are missing, damaged or cut short ({error}).") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if not match or tensor.dim() != 2:
            raise ReftError(f"{path}: expected pairs of matrices at linear layers, got {name}, {list(tensor.shape)}.")
        check_values(f"{path}: {name}", tensor)
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise ReftError(f"{path}: there are no tensors in it.")
    edits = {where: _make(path, where, pair, config) for where, pair in pairs.items()}
    return Lora(edits, *(_text(path, config, name) for name in (POSITIONS, "base_model_name_or_path", "task_type")))


def _find(path: str | os.PathLike) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=["adapter_*"]))
    except Exception as error:
        raise ReftError(f"{path}: expected an adapter's directory, or its name on the hub ({error}).") from None


def _read_config(place: Path, path: Any) -> dict[str, Any]:
    try:
        config = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReftError(f"{path}: expected an adapter of PEFT, found no {CONFIG_NAME} to read ({error}).") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ReftError(f"{path}: expected a LoRA, got an adapter of the type {kind!r}.")
    for name in _OTHERWISE:
        if config.get(name):
            raise ReftError(f"{path}: {name}: only LoRA as it is, h + (α/r) B A x, can be located.")
    if config.get("bias", "none") != "none":
        raise ReftError(f"{path}: bias: the base model's are trained in it, which are the same for every token.")
    return config


def _make(path: Any, where: str, pair: dict[str, Tensor], config: dict[str, Any]) -> LoraIntervention:
    """The edit of one linear layer."""
    if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
        shapes = ", ".join(f"lora_{name} {list(tensor.shape)}" for name, tensor in pair.items())
        raise ReftError(f"{path}: {where}: expected matrices A and B of one rank, got {shapes}.")
    (rank, width), (out, _) = pair["A"].shape, pair["B"].shape
    try:
        patterns = config.get("alpha_pattern") or {}
        alpha = float(patterns.get(get_pattern_key(patterns, where), config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReftError(f"{path}: lora_alpha: expected a number, got none ({error!r}).") from None
    if config.get("use_rslora"):  # α/√r
        alpha *= math.sqrt(rank)
    made = LoraIntervention(embed_dim=out, input_dim=width, low_rank_dimension=rank, alpha=alpha)
    with torch.no_grad():
        made.A.weight.copy_(pair["A"])
        made.B.weight.copy_(pair["B"])
    return made


def _text(path: Any, config: dict[str, Any], name: str) -> str | None:
    if (value := config.get(name)) is not None and not isinstance(value, str):
        raise ReftError(f"{path}: {name}: expected text, got {value!r}.")
    return value
