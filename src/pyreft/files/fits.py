"""Whether an adapter's tensors are those that its config asks for, as far as that can be told without its base model.

With the model, `adapter.check_tensors` tells all of it.
"""

import os
import re

import torch

from ..errors import ReftError
from ..interventions import INTERVENTIONS
from ..places.components import COMPONENTS
from ..places.structure import PREFIX
from ..tuner.config import ReftConfig
from ..tuner.representation import Representation

Shapes = dict[str, tuple[int, ...]]

_PLACE = re.compile(rf"(.+\.{PREFIX}(?:input|output))\.(\d+)\.(.+)")
_EMBEDDINGS = ("embed", "lm_head", "wte")  # which are there where they were asked for


def check_fits(directory: str | os.PathLike, config: ReftConfig, shapes: Shapes) -> None:
    """Compare the tensors of an adapter's file with its config: places, ranks, and the modules beside them.

    Args:
        shapes: of the tensors, by name.

    Raises:
        ReftError: places or modules that are missing, or tensors that are of none of them; those of a place that are
            not what its formula has.
    """
    layers = (config.base_model_shape or {}).get("num_hidden_layers")
    if config.representations is None and config.layers == "all" and layers is None:
        return  # as many as the model has
    entries, heads = config.expand(layers), config.modules_to_save or []
    places: dict[str, Shapes] = {}
    others = []
    for name, shape in shapes.items():
        if match := _PLACE.fullmatch(name):
            places.setdefault(f"{match[1]}.{match[2]}", {})[match[3]] = shape
        elif not any(f".{head}." in name for head in heads) and not any(word in name for word in _EMBEDDINGS):
            others.append(name)
    problems = [f"{name} is not known" for name in others]
    problems += [f"nothing of {head!r} is there" for head in heads if not any(f".{head}." in name for name in shapes)]
    problems += [
        f"nothing of the {entry.component} of layer {entry.layer} is there"
        for entry in entries
        if not any(_may_be(place, entry) for place in places)
    ]
    problems += [problem for place in places if (problem := _misfit(place, places[place], entries))]
    if not problems and len(places) != len(entries):
        problems = [f"it has tensors of {len(places)} places, the config names {len(entries)}"]
    if problems:
        more = f", and {len(problems) - 1} more" if problems[1:] else ""
        raise ReftError(
            f"{directory}: the file does not fit its config: {problems[0]}{more}. Was one of them edited, or copied "
            "from another adapter?"
        )


def _may_be(place: str, entry: Representation) -> bool:
    """Whether tensors are of an entry, by its layer's number or its module's path."""
    name = entry.component.rpartition(".")[2]
    if name.startswith("block_"):
        return f".{entry.layer}.{PREFIX}{name.removeprefix('block_')}." in place
    if name in COMPONENTS:  # some attentions are the block itself
        at_block = f".{entry.layer}.{PREFIX}" in place and "attention" not in name
        return str(entry.layer) in place.split(".") and not at_block
    path = re.sub(r"\[(\d+)\]", r".\1", entry.component).rpartition(".")[0]
    return f".{path}.{PREFIX}" in place


def _misfit(place: str, found: Shapes, entries: list[Representation]) -> str | None:
    """What is wrong with the tensors of a place; nothing if they are an entry's, or may be."""
    candidates = [entry for entry in entries if _may_be(place, entry)]
    if not candidates:
        return f"{place} is no place of it"
    if any(_has(entry, found) for entry in candidates):
        return None
    wanted = " or ".join(
        sorted(
            {f"{e.intervention}{f' of rank {e.low_rank_dimension}' * bool(e.low_rank_dimension)}" for e in candidates}
        )
    )
    has = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(found.items()))
    return f"{place} has {has}, which is no {wanted}"


def _has(entry: Representation, found: Shapes) -> bool:
    """Whether these are the tensors of an entry's intervention, at whatever width; of a user's class they may be."""
    if entry.intervention not in INTERVENTIONS:
        return True
    sizes = {size for shape in found.values() for size in shape}
    widths = sizes | {2 * size for size in sizes}  # RoAd has a number for each pair
    return any(
        _shapes(entry, width, other) == found for width in widths for other in (sizes if entry.reads_input else (None,))
    )


def _shapes(entry: Representation, width: int, input_width: int | None) -> Shapes | None:
    try:
        with torch.device("meta"):
            made = entry.make(width, input_width)
    except ReftError:  # no such width
        return None
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
