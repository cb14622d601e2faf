"""Functions of PEFT that take LoRA alone: of a model with representation edits they say what does the same here."""

import functools
from types import ModuleType
from typing import Any

from peft import helpers
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from torch import nn

from ..errors import ReftError
from .adapted import reft_layers


def name_ours() -> None:
    """Put the word of ours into PEFT's functions; LoRA's models go on to PEFT."""
    _refuse(
        helpers, "rescale_adapter_scale", "model.set_strength(name, multiplier), or strength=multiplier of one call"
    )
    _refuse(
        hotswap, "hotswap_adapter", "model.load_intervention(directory, adapter_name=name), which overwrites an adapter"
    )


def _refuse(module: ModuleType, name: str, instead: str) -> None:
    function = getattr(module, name)

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if reft_layers(model) and not any(isinstance(part, LoraLayer) for part in model.modules()):
            raise ReftError(f"{name} of PEFT takes LoRA alone. For representation edits there is {instead}.")
        return function(model, *args, **kwargs)

    setattr(module, name, call)
