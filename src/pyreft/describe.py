"""What an adapter's directory holds, in words and numbers: places, parameters, and the edited tokens of a text."""

import math
import os
from typing import Any

import torch

from .data.encode import default_format, prompt_text, token_ids, token_texts
from .files.adapter import read_config, read_shapes
from .files.fits import check_fits
from .loading import base_of, load_tokenizer
from .tuner.representation import Representation


def describe(adapter: str | os.PathLike) -> dict[str, Any]:
    """Return base model, number of parameters and edited places of an adapter, without loading a model.

    Raises:
        ReftError: not an adapter, or a damaged one, such as one whose tensors are not those of its config.
    """
    config, shapes = read_config(adapter), read_shapes(adapter)
    check_fits(adapter, config, shapes)
    groups: dict[str, dict[str, Any]] = {}
    for entry in config.expand((config.base_model_shape or {}).get("num_hidden_layers", 0)):
        place = {
            "intervention": entry.intervention,
            "rank": entry.low_rank_dimension,
            "component": entry.component,
            "positions": _rule_name(entry),
            "dropout": entry.dropout or 0.0,
        }
        settings = {"act_fn": entry.act_fn, "add_bias": entry.add_bias or None, **(entry.intervention_kwargs or {})}
        place["settings"] = {name: value for name, value in settings.items() if value is not None}
        groups.setdefault(repr(place), {**place, "layers": []})["layers"].append(entry.layer)
    return {
        "base_model": config.base_model_name_or_path,
        "base_model_shape": config.base_model_shape,
        "parameters": sum(map(math.prod, shapes.values())),
        "prompt_format": config.prompt_format,
        "places": list(groups.values()),
    }


def located_tokens(adapter: str | os.PathLike, prompt: str, model: str | None = None) -> dict[str, list[dict]]:
    """Return, for each position rule of an adapter, the tokens of a prompt and which of them are edited.

    The prompt is written as the adapter was trained on; `model` names the base model if not the remembered one.
    """
    config = read_config(adapter)
    tokenizer = load_tokenizer(model or base_of(adapter))
    form: Any = config.prompt_format or default_format(tokenizer)
    ids = token_ids(tokenizer, prompt_text(tokenizer, prompt, form))
    shown: dict[str, list[dict]] = {}
    for entry in config.expand((config.base_model_shape or {}).get("num_hidden_layers", 0)):
        rule = entry.rule()
        if rule is not None:
            edited = rule.locate(torch.ones(1, len(ids), dtype=torch.bool), torch.tensor([ids]))[0].tolist()
            tokens = token_texts(tokenizer, ids)
            shown[_rule_name(entry)] = [
                {"token": token, "edited": flag} for token, flag in zip(tokens, edited, strict=True)
            ]
    return shown


def _rule_name(entry: Representation) -> str:
    name = entry.positions or "given with each call"
    return f"{name} ({entry.side})" if entry.side else name
