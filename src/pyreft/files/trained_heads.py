"""Heads of the base model, such as a classifier's, that were made trainable: saved as if PEFT had wrapped them.

An adapter's files then name them in `modules_to_save`, so that every way to load an adapter brings them back.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..tuner.layer import ReftLayer
from .adapter import read_config, weights_file
from .pickles import read_pickle
from .text import read_json

_PREFIX = "base_model.model."  # of the names in an adapter's file


def trained_heads(base: nn.Module) -> dict[str, nn.Module]:
    """Return the trained children of a model beside its backbone, but for those that PEFT takes care of.

    Other trained parameters of the base model are no part of an adapter; a warning says so.
    """
    backbone = getattr(base, getattr(base, "base_model_prefix", "") or "", None)
    tuned = {p for module in base.modules() if isinstance(module, BaseTunerLayer) for p in module.parameters()}
    shared = set(backbone.parameters()) if isinstance(backbone, nn.Module) else set()
    heads = {
        name: child
        for name, child in base.named_children()
        if child is not backbone
        and any(parameter.requires_grad for parameter in child.parameters())
        and not any(parameter in tuned | shared for parameter in child.parameters())
        and not isinstance(child, AuxiliaryTrainingWrapper)
    }
    saved = [*heads.values(), *(m for m in base.modules() if isinstance(m, (ReftLayer, AuxiliaryTrainingWrapper)))]
    kept = {parameter for module in saved for parameter in module.parameters()}
    lost = [name for name, p in base.named_parameters() if p.requires_grad and p not in kept]
    if lost:
        warnings.warn(
            f"{len(lost)} trained parameters of the base model, such as {lost[0]}, are not saved with the adapter; "
            "name their modules in ReftConfig(modules_to_save=[...]), or save the base model (or its LoRA), too.",
            stacklevel=2,
        )
    return heads


def tell_of_resized(base: Any, name: str | None) -> None:
    """Warn that embeddings of another size than those of the base model's files are no part of its adapters."""
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    if not size or not name:
        return
    try:
        own = type(base.config).from_pretrained(name, local_files_only=True).vocab_size
    except (OSError, ValueError):  # not there, or no config of this kind
        return
    if own != size:
        warnings.warn(
            f"The embeddings have {size:,} rows, those of {name} {own:,}. They are not saved with the adapter; "
            "save_pretrained(directory, save_embedding_layers=True) does. Resize those of the base model before you "
            "load it.",
            stacklevel=3,
        )


def add_heads(directory: str, base: nn.Module) -> None:
    """Add the trained heads of a base model to the adapters just saved in a directory."""
    heads = trained_heads(base)
    tensors = {
        f"{_PREFIX}{name}.{key}": tensor.contiguous()
        for name, head in heads.items()
        for key, tensor in head.state_dict().items()
    }
    for path in Path(directory).rglob(CONFIG_NAME) if heads else ():
        weights = weights_file(path.parent)
        if weights.name == WEIGHTS_NAME:
            torch.save({**read_pickle(weights), **tensors}, weights)
        else:
            save_file({**load_file(weights), **tensors}, weights, metadata={"format": "pt"})
        config = read_json(path)
        config["modules_to_save"] = sorted({*(config.get("modules_to_save") or ()), *heads})
        path.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def saved_heads(directory: str | os.PathLike, base: nn.Module) -> dict[str, Tensor]:
    """Return, by their names in an adapter's file, the model's tensors for the heads that the adapter brings along."""
    names = read_config(directory).modules_to_save or ()
    plain = {
        name: child
        for name, child in base.named_children()
        if name in names and not isinstance(child, AuxiliaryTrainingWrapper)
    }
    return {f"{_PREFIX}{name}.{key}": t for name, head in plain.items() for key, t in head.state_dict().items()}
