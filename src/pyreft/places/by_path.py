"""A place that is named by the path of a module, as in `"model.layers[3].mlp.output"`: its side and its width."""

import re
from collections.abc import Sequence

from torch import nn

from ..errors import ReftError, did_you_mean
from ..sharded import shape_of
from .lookup import ACTIVATION, Side, Site, parts_of
from .structure import Stack, has_stacks, path_of, stack_module, states_width, widths_of


def find_path(model: nn.Module, component: str, names: Sequence[str]) -> Site:
    """Return the place that the path of a module names, followed by `.input` or `.output`.

    Raises:
        ReftError: no such module; it tells the `names` that one could give instead.
    """
    path, _, end = re.sub(r"\[(\d+)\]", r".\1", component).rpartition(".")
    side: Side = "input" if end == "input" else "output"
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not path or module is None or end not in ("input", "output"):
        raise ReftError(
            f"expected one of {', '.join(names)}, or a module's path with .input or .output, got "
            f"{component!r}.{did_you_mean(component, names)}",
            setting="component",
        )
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        part = next((name for name, _ in module.named_children()), "0")
        raise ReftError(
            f"{path!r} holds modules and is never called itself; name one of them, as in {path}.{part}.{end}.",
            setting="component",
        )
    return Site(path, side, _width_at(model, path, module, side), stack=_stack_of(model, path))


def _width_at(model: nn.Module, path: str, module: nn.Module, side: Side) -> int:
    if (widths := widths_of(module)) is not None:
        return widths[side == "output"]
    if (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None:  # a norm or embeddings
        return shape_of(weight)[-1]
    parent, _, name = path.rpartition(".")
    if re.fullmatch(ACTIVATION, name.lower()):
        linears = [found for child in model.get_submodule(parent).children() if (found := widths_of(child))]
        if linears:
            return linears[-1][0]
    try:
        return states_width(model, path)
    except ReftError:
        if (width := _width_by_linears(model, path, module, side)) is None:
            raise
        return width


def _width_by_linears(model: nn.Module, path: str, module: nn.Module, side: Side) -> int | None:
    """The width at a module, by the linear layers inside it or, where there are none, by those beside it."""
    if inside := [widths for _, part in parts_of((path, module)) if (widths := widths_of(part))]:
        return inside[0][0] if side == "input" else inside[-1][1]
    if any(True for _ in module.parameters()):
        return None
    beside = list(model.get_submodule(path.rpartition(".")[0]).children())  # an activation, say, or dropout
    at = next(number for number, child in enumerate(beside) if child is module)
    if before := [widths for child in beside[:at] if (widths := widths_of(child))]:
        return before[-1][1]
    after = [widths for child in beside[at:] if (widths := widths_of(child))]
    return after[0][0] if after else None


def _stack_of(model: nn.Module, path: str) -> Stack:
    """The stack whose tokens pass a module."""
    if not has_stacks(model):
        return ""
    encoder = path_of(model, stack_module(model, "encoder"))
    return "encoder" if f"{path}.".startswith(f"{encoder}.") else "decoder"
