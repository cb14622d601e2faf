"""How edits come onto a model and off it: what fits is checked first, then its calls are watched."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ReftError, did_you_mean
from ..interventions import Intervention
from ..places.components import Site, find_site, number_of_layers
from ..places.structure import generates, has_stacks, hidden_width, stack_module
from . import hooks
from .adapted import edits_of
from .config import DEFAULT_POSITIONS, ReftConfig, shape_differences
from .continuous import Batches
from .overrides import METHODS, Methods
from .registry import Edits
from .representation import Representation

# by task, how PEFT knows the modules that turn states into classes; of these a model may have one
CLASSIFIERS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_FILLED_IN = "_filled_in"  # the rule that a model filled in, on the config
SitesByPath = dict[str, list[tuple[Site, int, Intervention]]]


def make_interventions(model: nn.Module, config: ReftConfig) -> tuple[list[Representation], list[Site], SitesByPath]:
    """Check a config against a model and make its interventions.

    The config notes whose they are: its modules become names, and it gets the shape of the model and the rule that goes
    with it. Nothing is changed if anything does not fit.
    """
    shape = base_model_shape(model)
    if config.base_model_shape is not None and (other := shape_differences(config.base_model_shape, shape)):
        raise ReftError(f"The adapter was made for another base model: this one has {other}.")
    _check_heads(model, config)
    representations = representations_of(config, model)
    sites = [site_of(entry, model) for entry in representations]
    by_path: SitesByPath = {}
    for index, (entry, site) in enumerate(zip(representations, sites, strict=True)):
        intervention = entry.make(site.width, site.input_width)
        if intervention is entry.intervention:
            _check_not_in_use(model, intervention)
        by_path.setdefault(site.path, []).append((site, index, intervention))
    for entry in representations:
        entry.settle()
    config.base_model_shape = shape
    if config.representations is None and config.positions is None:
        config.positions = _default_positions(model)
        setattr(config, _FILLED_IN, config.positions)
    return representations, sites, by_path


@contextmanager
def unused(config: ReftConfig) -> Iterator[None]:
    """Leave a config as it was, with the modules that it was given, if no adapter can be made of it."""
    kept, given = dict(vars(config)), [(entry, entry.intervention) for entry in config.representations or ()]
    try:
        yield
    except BaseException:
        config.__dict__.update(kept)
        for entry, intervention in given:
            entry.intervention = intervention
        raise


def own_config(config: ReftConfig, model: nn.Module) -> ReftConfig:
    """The config; or a copy of one whose rule was filled in for another kind of model, which it goes on to serve."""
    filled = getattr(config, _FILLED_IN, None)
    if filled is None or filled != config.positions or filled == _default_positions(model):
        return config
    other = copy.copy(config)
    other.positions = None
    return other


def _check_not_in_use(model: nn.Module, intervention: Intervention) -> None:
    """Refuse a module that edits for another adapter of the model: the two would train one another."""
    for layer in getattr(edits_of(model), "layers", ()):
        for name in layer:
            if any(one is intervention for _, one in layer.of(name)):
                raise ReftError(
                    f"this {type(intervention).__name__} is that of the adapter {name!r}, and what one of the two "
                    "learns the other would have. Give one of its own, or copy.deepcopy(intervention).",
                    setting="intervention",
                )


def _check_heads(model: nn.Module, config: ReftConfig) -> None:
    """Refuse a module to train beside the edits that the model does not have: PEFT would pass over its name."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    names = [name for path in paths if len(name := path.rsplit(".", 1)[-1]) > 1]
    for name in config.modules_to_save or ():
        if name not in task_heads(config) and not any(path.endswith(name) for path in paths):
            raise ReftError(
                f"expected modules of the model, which has no {name!r}.{did_you_mean(name, names)}",
                setting="modules_to_save",
            )


def task_heads(config: ReftConfig) -> tuple[str, ...]:
    """How PEFT knows the classifier of a config's task, by several names if there is not one for all models."""
    return CLASSIFIERS.get(str(getattr(config.task_type, "value", config.task_type)), ())


def representations_of(config: ReftConfig, model: nn.Module) -> list[Representation]:
    """The edited places of a config in a model, one by one."""
    if config.representations is not None:
        return config.representations
    return config.expand(number_of_layers(model, config.component), _default_positions(model))


def _default_positions(model: nn.Module) -> str:
    """All tokens for a model that does not generate: the head of a classifier may read any of them."""
    return DEFAULT_POSITIONS if generates(model) else "all"


def site_of(entry: Representation, model: nn.Module) -> Site:
    """Where in a model a representation edits.

    Raises:
        ReftError: there is no such place, or nothing to read where the intervention reads; or no forward passes there.
    """
    site = find_site(model, entry.component, entry.layer, entry.head, linear=entry.reads_input)
    parent = site.path.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise ReftError(
            f"PyTorch's MultiheadAttention reads the weights of {site.path!r} and never calls it, so nothing would be "
            f"edited; the attention as a whole can be, as {parent}.output.",
            setting="component",
        )
    return site


def check_name(adapter_name: str) -> None:
    """Refuse a name by which PEFT would take an adapter's modules for others, or save them elsewhere than asked."""
    if adapter_name in ("model", "base_layer", "training"):
        raise ReftError(
            f"PEFT or torch calls something else {adapter_name!r}; give another name.", setting="adapter_name"
        )
    parts = Path(adapter_name).parts
    if os.path.isabs(adapter_name) or not parts or ".." in parts:
        raise ReftError(
            f"an adapter is saved in a directory of its name, and {adapter_name!r} names none within that where it is "
            "saved; give another name.",
            setting="adapter_name",
        )


def check_free(model: nn.Module, adapter_name: str, wrapped: bool) -> None:
    """Refuse edits beside those of another PEFT model on one base model, which both would then have.

    Args:
        wrapped: whether a PEFT model is being made, not an adapter added to the model itself.
    """
    edits = edits_of(model)
    if edits is None:
        return
    if wrapped or edits.wrapped:
        raise ReftError(
            f"This base model carries the edits of a model made before ({', '.join(edits.rules)}), and each of the "
            "two would have those of the other. Add an adapter to that one, model.add_adapter(name, config), take its "
            "edits off with model.unload(), or load the base model once more."
        )
    if adapter_name in edits.rules:
        raise ReftError(
            f"the model has an adapter {adapter_name!r}; give the new one another name.", setting="adapter_name"
        )


def edits_for(model: nn.Module) -> Edits:
    """New edits of a model, whose calls are not watched yet; of one that is compiled, the model within."""
    inner = getattr(model, "_orig_mod", model)
    return Edits(inner, tuple(_stacks(inner)) or ("",))


def watch(edits: Edits) -> None:
    """Watch the calls of a model from now on."""
    batches = Batches(edits)
    hooks.attach(edits, batches, _stacks(edits.model))
    Methods(edits, batches).attach()


def detach(model: nn.Module, edits: Edits | None = None) -> None:
    """Take all representation edits off a model: every hook and every child module.

    Args:
        edits: those of the model, where none of its modules may have any yet.
    """
    edits = edits or edits_of(model)
    if edits is not None:
        edits.removed = True
        hooks.detach(edits)
        for name in METHODS:
            edits.model.__dict__.pop(name, None)
        for layer in edits.layers:
            layer.detach()
        configs = {n: c for n, c in vars(model).pop("peft_config", {}).items() if not isinstance(c, ReftConfig)}
        if configs:  # of a LoRA
            model.peft_config = configs  # type: ignore[assignment]
    if "peft_config" not in vars(model) and getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False  # type: ignore[assignment]  # by transformers' `add_adapter`


def take_back(model: nn.Module, modules: dict[str, nn.Module], edits: Edits | None = None) -> None:
    """Take all representation edits off a model, and what PEFT has put around its modules to train them beside.

    Args:
        modules: those that the model had before, by their paths.
        edits: see `detach`.
    """
    detach(model, edits)
    for path, module in modules.items():
        if path and model.get_submodule(path) is not module:
            model.set_submodule(path, module)


def _stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The encoder and the decoder of a model that has them."""
    return {name: stack_module(model, name) for name in ("encoder", "decoder")} if has_stacks(model) else {}


def base_model_shape(model: nn.Module) -> dict[str, Any]:
    """What tells base models apart that an adapter cannot be moved between; no sizes where a network has no blocks."""
    shape: dict[str, Any] = {
        "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "hidden_size": None,
        "num_hidden_layers": None,
    }
    with suppress(ReftError):
        shape["num_hidden_layers"] = number_of_layers(model)
        shape["hidden_size"] = hidden_width(model)
    return shape


def leave_inference(model: nn.Module) -> None:
    """Replace parameters and buffers that were made in `torch.inference_mode()`, which no later step can train on.

    Those that several modules share stay shared; those of a class of their own, as of quantised weights, stay.
    """
    made: dict[int, tuple[Tensor, Any]] = {}  # by its id, one that was replaced, which stays alive, and its copy
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if type(tensor) not in (Tensor, nn.Parameter) or not cast(Tensor, tensor).is_inference():
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = cast(Tensor, tensor), _copy(cast(Tensor, tensor))
                    held[name] = made[id(tensor)][1]


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
