"""Edits of the formula `lora` as a LoRA of PEFT: its file, and a word in its config about the tokens.

PEFT's LoRA acts at every token. One that acts at some tokens alone says so where PEFT reads how to begin, which PEFT
then refuses to do, with these words: nothing of it takes the one for the other.
"""

import json
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ReftError
from ..interventions import LoraIntervention
from ..places.structure import path_of, widths_of
from ..positions import Positions
from ..tuner.adapted import reft_layers
from ..tuner.config import ReftConfig
from ..tuner.from_peft import POSITIONS
from ..tuner.layer import ReftLayer
from .together import save_together

_LOCATED = "acts at the tokens {rule} alone, which PEFT cannot do: load it with pyreft.ReftConfig.from_lora"

Pair = tuple[Tensor, Tensor, float]  # A, [r, k], B, [d, r], and α/r


def save_lora(model: Any, directory: str | PathLike, adapter_name: str) -> None:
    """Write an adapter as a LoRA of PEFT; with the rule `all` it is one, else see above.

    Parts of one fused layer, such as the queries and values of `c_attn`, become one pair of matrices.

    Args:
        model: a `ReftModel`.
        directory: made if it is not there.
        adapter_name: whose edits are all of the formula `lora`.

    Raises:
        ReftError: other formulas, locations instead of a rule, several rules, or modules that are trained beside.
    """
    config, base = model.peft_config[adapter_name], model.get_base_model()
    if config.modules_to_save:
        raise ReftError(f"a LoRA of edits alone is written, {config.modules_to_save} not.", setting="modules_to_save")
    rule = _rule(config)
    layers = [layer for layer in reft_layers(base) if adapter_name in layer]
    pairs = {path_of(base, layer.get_base_layer()): _pair(layer, adapter_name) for layer in layers}
    data = _config(config, pairs) | {"fan_in_fan_out": all(hasattr(one.get_base_layer(), "nf") for one in layers)}
    if not Positions.parse(rule).endless:
        data |= {POSITIONS: rule, "init_lora_weights": _LOCATED.format(rule=rule)}
    tensors = {
        f"base_model.model.{path}.lora_{name}.weight": tensor.contiguous()
        for path, pair in pairs.items()
        for name, tensor in zip("AB", pair[:2], strict=True)
    }

    def write(staged: str) -> None:
        save_file(tensors, str(Path(staged, SAFETENSORS_WEIGHTS_NAME)), metadata={"format": "pt"})
        Path(staged, CONFIG_NAME).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    save_together(directory, write)


def _rule(config: ReftConfig) -> str:
    """The one rule of all edits."""
    places = config.expand((config.base_model_shape or {}).get("num_hidden_layers", 0))
    rules = {f"{place.positions or 'given with each call'}{f' ({place.side})' * bool(place.side)}" for place in places}
    rule = places[0].positions
    if len(rules) > 1 or rule is None or places[0].side:
        raise ReftError(
            f"a LoRA has one rule for all of its edits, got {', '.join(sorted(rules))}.", setting="positions"
        )
    return rule


def _pair(layer: ReftLayer, name: str) -> Pair:
    """The matrices of one linear layer."""
    module = layer.get_base_layer()
    loras: list[Any] = [edit for _, edit in layer.of(name)]
    others = sorted({type(edit).__name__ for edit in loras if not isinstance(edit, LoraIntervention)})
    widths = widths_of(module)
    if others or widths is None:
        raise ReftError(
            f"only the formula 'lora' can be written as a LoRA, got {', '.join(others)}.", setting="intervention"
        )
    scales = {edit.scale for edit in loras}
    if len(scales) > 1:
        raise ReftError(f"the parts of one layer have one α/r in a LoRA, got {scales}.", setting="alpha")
    down, up = [], []
    for columns, edit in zip(layer.columns[name], loras, strict=True):
        a, b = (matrix.weight.detach().float().cpu() for matrix in (edit.A, edit.B))
        down.append(a)
        up.append(b if columns is None else columns.put(torch.zeros(len(a), widths[1]), b.T).T)
    return torch.cat(down), torch.cat(up, dim=1), scales.pop()


def _config(config: ReftConfig, pairs: dict[str, Pair]) -> dict[str, Any]:
    """PEFT's config: the most common rank and scale, and what differs by layer."""
    sizes = {path: (len(a), scale * len(a)) for path, (a, _, scale) in pairs.items()}
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    made = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(pairs),
        rank_pattern={path: r for path, (r, _) in sizes.items() if r != rank},
        alpha_pattern={path: a for path, (_, a) in sizes.items() if a != alpha},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    return made.to_dict() | {"peft_type": "LORA", "target_modules": sorted(pairs)}
