"""What a network is made of: its stacks, the list of blocks in each, and how wide the states between them are.

Found by structure, so there is no table of architectures. Knows nothing of components, edits or tokens.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from ..errors import ReftError
from ..sharded import shape_of

PREFIX = "reft_"  # of the names of modules that hold edits: `reft_input` and `reft_output`
Stack = Literal["", "encoder", "decoder"]


def without_adapters(model: nn.Module) -> nn.Module:
    """The model under however many PEFT models, as of a LoRA."""
    from peft import PeftModel  # here alone: places are found without PEFT

    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def generates(model: Any) -> bool:
    """Whether a model can write text: a language model, and no classifier, encoder or backbone."""
    return hasattr(model, "can_generate") and model.can_generate()


def has_stacks(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder, each with tokens of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stack_module(model: Any, stack: Stack = "") -> Any:
    """Return the module whose `forward` takes the tokens of a stack.

    Args:
        model: any network.
        stack: `"encoder"` or `"decoder"` of an encoder-decoder model, or `""` for the model itself.

    Raises:
        ReftError: a stack of a model that has none.
    """
    if not stack:
        return model
    if not has_stacks(model):
        raise ReftError(
            f"{type(model).__name__} is no encoder-decoder model; leave out the prefix '{stack}.'.", setting="component"
        )
    return model.get_encoder() if stack == "encoder" else model.get_decoder()


def text_model(model: Any) -> Any:
    """The language model inside a model for text and images or sound; none in one that is for text alone."""
    config: Any = getattr(model, "config", None)
    composite = hasattr(config, "get_text_config") and config.get_text_config() is not config
    return model.get_decoder() if composite else None


def find_blocks(model: nn.Module, stack: Stack = "") -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the blocks of a stack.

    It is the outermost `ModuleList` that is as long as the config says or, failing that, that has the most
    parameters. Of a model for text and images or sound, the blocks are those of its language model.

    Raises:
        ReftError: if there is no such list, or lists of norms, attentions and MLPs instead, as in XLM.
    """
    scope = _scope(model, stack)
    count = getattr(getattr(scope, "config", None), "num_hidden_layers", None)
    lists = list(_outermost_lists(scope))
    if not lists:
        raise ReftError(
            f"No list of blocks was found in {type(model).__name__}. Give the place to edit by its path instead, "
            "as in component='encoder.layers[3].output'."
        )
    lists = [found for found in lists if len(found) == count] or lists
    blocks = lists[0] if len(lists) == 1 else max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    path = path_of(model, blocks)
    beside = model.get_submodule(path.rpartition(".")[0]).children()
    alike = [found for found in beside if isinstance(found, nn.ModuleList) and len(found) == len(blocks)]
    if 0 < sum(map(_are_norms, alike)) < len(alike) - 1:  # not of norms that stand between blocks
        raise ReftError(
            f"{type(model).__name__} has no blocks, but lists of their parts, such as {path!r}. Give the place to edit "
            f"by its path instead, as in component='{path}[{len(blocks) - 1}].output'."
        )
    return path, blocks


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path by which a model knows a module."""
    return next(path for path, found in model.named_modules() if found is module)


def hidden_width(model: nn.Module, stack: Stack = "") -> int:
    """The width of the states that flow between the blocks of a stack.

    Raises:
        ReftError: if neither the blocks nor a config tell it.
    """
    path, _ = find_blocks(model, stack)
    return states_width(model, f"{path}.0")


def states_width(model: nn.Module, path: str) -> int:
    """The width of the states that a module takes and returns, which is that of the block it lies in.

    It is read off a norm that stands beside the parts of the block, or else from the nearest config.

    Raises:
        ReftError: if neither tells it.
    """
    inside = re.match(r".*?\.\d+(?=\.|$)", path)
    block = model.get_submodule(inside[0]) if inside else nn.Identity()
    weights = [dict(child.named_parameters(recurse=False)).get("weight") for child in block.children()]
    configs = (getattr(module, "config", None) for module in ancestors(model, path))
    shapes = [shape_of(weight) for weight in weights if weight is not None]
    widths = [shape[0] for shape in shapes if len(shape) == 1]
    widths += [width for config in configs if isinstance(width := getattr(config, "hidden_size", None), int)]
    if not widths:
        raise ReftError(
            f"The width of the states at {path!r} is neither in a norm there nor in a config.hidden_size. Edit a "
            "linear layer, a norm or embeddings there, by its path."
        )
    return widths[0]


def ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at a path and those it lies in, from the inside to the model."""
    names = path.split(".") if path else []
    for end in range(len(names), -1, -1):
        yield model.get_submodule(".".join(names[:end]))


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """(input width, output width) of a linear layer, one that an adapter of another method wraps included."""
    linear: Any = getattr(module, "base_layer", module)
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    if hasattr(linear, "nx"):  # GPT-2's Conv1D
        return linear.nx, linear.nf
    return None


def _scope(model: Any, stack: Stack) -> Any:
    """The part of a model that holds the blocks: a stack, the language model of a composite model, or all of it."""
    inner = None if stack else text_model(model)
    return stack_module(model, stack) if inner is None else inner


def _are_norms(parts: nn.ModuleList) -> bool:
    shapes = [shape_of(parameter) for parameter in parts.parameters()]
    return bool(shapes) and all(len(shape) == 1 for shape in shapes)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for name, child in module.named_children():
        if name.startswith(PREFIX):  # edits are no blocks
            continue
        if not isinstance(child, nn.ModuleList):
            yield from _outermost_lists(child)
        elif len(child):
            yield child
