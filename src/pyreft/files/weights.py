"""The weights of an adapter in a model: which tensors its file must have, and others put in their place."""

import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..errors import ReftError
from ..places.structure import PREFIX
from ..sharded import is_sharded
from ..tuner.adapted import interventions_of
from ..tuner.config import ReftConfig
from ..tuner.representation import Representation
from .adapter import check_room, is_adapter, load_tensors, read_config, read_shapes
from .original import Values, all_or_none, fill, legacy_place, read_interventions, read_model
from .together import reading
from .trained_heads import saved_heads


def expected_tensors(model: PeftModel, adapter_name: str, place: str | PathLike) -> dict[str, Tensor]:
    """Return the tensors of an adapter in a model, by their names in its file; and the embeddings that are in it."""
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    more = read_shapes(place).keys() - own.keys()
    if any("embed" in name or "lm_head" in name or "wte" in name for name in more):
        whole = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True)
        own |= {name: whole[name] for name in more & whole.keys()}
    return own


def checked_load(
    model: PeftModel, adapter_name: str, place: Path, load: Callable[[], Any], *, renamed: bool = False
) -> Any:
    """Let PEFT load an adapter from a directory, which is checked first; an adapter that does not fit is not there.

    Args:
        renamed: whether the tensors get other names while they are loaded.

    Raises:
        ReftError: a damaged adapter, or one that does not fit.
    """
    known, overwritten = adapter_name in model.peft_config, {}
    with reading(place):
        if is_adapter(place) and not known:
            check_room(place, read_config(place), model.get_base_model())
        elif is_adapter(place) and not renamed and not any(map(is_sharded, model.parameters())):
            _check_edits(model.peft_config[adapter_name], place, positions=True)
            heads = saved_heads(place, model.get_base_model())
            overwritten = expected_tensors(model, adapter_name, place) | heads
            load_tensors(place, overwritten)  # PEFT would load whatever there is
        try:
            with all_or_none(overwritten.values()):
                found = load()
            own = rf"\.{PREFIX}(input|output)\.{re.escape(adapter_name)}\."
            # PEFT counts those of others, too, if this adapter's name is a part of theirs
            found.missing_keys[:] = [key for key in found.missing_keys if re.search(own, key)]
            if found.missing_keys or found.unexpected_keys:
                raise ReftError(f"{place}: the file does not fit its config: {found}.")
        except BaseException as error:  # also where it is interrupted
            if not known and adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            if "size mismatch" in str(error):
                raise ReftError(f"{place}: {error}") from error
            raise
    return found


def overwrite(model: PeftModel, adapter_name: str, directory: str | PathLike, include_model: bool) -> None:
    """Load the weights of a saved adapter into one of a model, in place.

    Args:
        model: the adapted model.
        adapter_name: the adapter to overwrite, whose places must be those of the saved one.
        directory: where this library saved, or the original or its trainers.
        include_model: for files of the original: load what it trained of the base model, too.

    Raises:
        ReftError: files that are missing, damaged, or of another adapter; the model is then as it was.
    """
    config = model.peft_config[adapter_name]
    place = legacy_place(directory)
    if place is not None:
        representations = config.expand(config.base_model_shape["num_hidden_layers"])
        fill(_legacy_values(model, adapter_name, place, representations, include_model))
        return
    with reading(directory):
        _check_edits(config, directory)
        heads = saved_heads(directory, model.get_base_model())
        expected = expected_tensors(model, adapter_name, directory) | heads
        state = load_tensors(directory, expected)
    with all_or_none(expected.values()):
        with torch.no_grad():
            for key, tensor in heads.items():
                tensor.copy_(state.pop(key))
        set_peft_model_state_dict(model, state, adapter_name)


def _legacy_values(
    model: PeftModel, name: str, place: Path, representations: list[Representation], include_model: bool
) -> Values:
    values = read_interventions(place, representations, interventions_of(model, name).values())
    if include_model:  # a module that the adapter trains stands for the base model's
        parameters = {
            re.sub(rf"\b(original_module|modules_to_save\.{re.escape(name)})\.", "", path): parameter
            for path, parameter in model.get_base_model().named_parameters()
        }
        values += read_model(place, parameters)
    return values


def _check_edits(config: ReftConfig, directory: str | PathLike, positions: bool = False) -> None:
    """Refuse a directory of other edits than a config's, of which the tensors alone would not tell.

    Args:
        positions: whether the tokens have to be the same, too.

    Raises:
        ReftError: with both.
    """
    layers = (config.base_model_shape or {}).get("num_hidden_layers")
    ours, theirs = (_edits(one.expand(layers), positions) for one in (config, read_config(directory)))
    if ours != theirs:
        raise ReftError(f"{directory}: expected the edits of this model, {ours}; it holds {theirs}.")


def _edits(representations: list[Representation], positions: bool) -> list[tuple]:
    """What says, beside the tensors, which edits they make."""
    names = ("layer", "component", "intervention", "act_fn", *["positions"] * positions)
    return [
        (*(getattr(entry, name) for name in names), (entry.intervention_kwargs or {}).get("alpha"))
        for entry in representations
    ]
