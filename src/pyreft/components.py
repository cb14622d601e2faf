"""Where in a network: from a layer's number and a component's name to a module, its side and its width.

Found by structure and by name patterns, without a table of architectures. Knows nothing of edits or tokens.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .errors import ReftError, did_you_mean

# component -> (names of the sub-module of a block, or none for the block itself; which side of it)
_PARTS: dict[str, tuple[tuple[str, ...], Literal["input", "output"]]] = {
    "block_input": ((), "input"),
    "block_output": ((), "output"),
    "mlp_input": (("mlp", "feed_forward", "ffn", "ff"), "input"),
    "mlp_output": (("mlp", "feed_forward", "ffn", "ff"), "output"),
    "mlp_activation": (("mlp", "feed_forward", "ffn", "ff"), "output"),
    "attention_input": (("self_attn", "attn", "attention", "self_attention"), "input"),
    "attention_output": (("self_attn", "attn", "attention", "self_attention"), "output"),
}
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
_DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo", "dense")
COMPONENTS = tuple(_PARTS)


@dataclass(frozen=True)
class Site:
    """One place to edit: a module of the model by its path, its input or its output, and how wide that is."""

    path: str
    side: Literal["input", "output"]
    width: int


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a model's blocks: the longest `ModuleList` of modules of one class.

    Raises:
        ReftError: if the model has no such list.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        if alike and (best is None or len(module) > len(best[1])):
            best = path, module
    if best is None:
        raise ReftError(
            f"No list of blocks was found in {type(model).__name__}. Give the place to edit by its path instead, "
            "as in component='encoder.layers[3].output'."
        )
    return best


def number_of_layers(model: nn.Module) -> int:
    """How many blocks the model has."""
    return len(find_blocks(model)[1])


def find_site(model: nn.Module, component: str, layer: int | None = None) -> Site:
    """Return the place that a component names.

    Args:
        model: any network.
        component: one of `COMPONENTS`, with a layer, or the path of a module followed by `.input` or `.output`,
            such as `"model.layers[3].mlp.output"`.
        layer: the number of the block, counted from 0; not needed for a path.

    Raises:
        ReftError: a component or layer that the model does not have; the message lists those it has.
    """
    if component not in _PARTS:
        return _find_path(model, component)
    list_path, blocks = find_blocks(model)
    if layer is None or not 0 <= layer < len(blocks):
        raise ReftError(f"layer: this model has the layers 0 to {len(blocks) - 1}, got {layer}.")
    names, side = _PARTS[component]
    path, module = f"{list_path}.{layer}", blocks[layer]
    if names:
        name = next((name for name in names if hasattr(module, name)), None)
        if name is None:
            raise ReftError(
                f"component: {component!r} was not found in a block of {type(model).__name__}, whose parts are "
                f"{', '.join(name for name, _ in module.named_children())}. Give its path, such as "
                f"'{path}.<part>.{side}'."
            )
        path, module = f"{path}.{name}", getattr(module, name)
    if component == "mlp_activation":
        act = next((name for name in _ACTIVATIONS if isinstance(getattr(module, name, None), nn.Module)), None)
        down = next((name for name in _DOWN_PROJECTIONS if hasattr(module, name)), None)
        widths = None if down is None else _linear_widths(getattr(module, down))
        if act is None or widths is None:
            raise ReftError(
                f"component: no activation and down projection were found in {path!r}; give a path such as "
                f"'{path}.<part>.input'."
            )
        return Site(f"{path}.{act}", side, widths[0])
    return Site(path, side, hidden_width(model))


def _find_path(model: nn.Module, component: str) -> Site:
    path, _, end = re.sub(r"\[(\d+)\]", r".\1", component).rpartition(".")
    side: Literal["input", "output"] = "input" if end == "input" else "output"
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not path or module is None or end not in ("input", "output"):
        raise ReftError(
            f"component: expected one of {', '.join(COMPONENTS)}, or a module's path with .input or .output, got "
            f"{component!r}.{did_you_mean(component, COMPONENTS)}"
        )
    widths = _linear_widths(module)
    return Site(path, side, hidden_width(model) if widths is None else widths[side == "output"])


def hidden_width(model: nn.Module) -> int:
    """The width of the states that flow between the blocks."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ReftError(f"The width of the hidden states of {type(model).__name__} is not in its config.hidden_size.")
    return width


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(input width, output width) of a linear layer, one that an adapter of another method wraps included."""
    linear: Any = getattr(module, "base_layer", module)
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    if hasattr(linear, "nx"):  # GPT-2's Conv1D
        return linear.nx, linear.nf
    return None
