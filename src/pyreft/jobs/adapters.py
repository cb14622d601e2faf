"""An adapter from a job's settings: representation edits, or LoRA on the same data to compare them with."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..errors import ReftError
from ..files.adapter import read_config, read_config_data, read_shapes
from ..files.together import save_together
from ..model import ReftModel, get_reft_model
from ..tuner.config import ReftConfig, ReftPeftType, shape_differences
from .settings import LORA, METHODS, TrainingJob

# what a checkpoint and the job that goes on from it have in common
_SAME_REFT = (
    *("layers", "positions", "component", "intervention", "low_rank_dimension", "share_weights"),
    *("prompt_format", "base_model_shape"),
)
_SAME_LORA = ("r", "lora_alpha", "target_modules")
_REFT_ALONE = ("layers", "positions", "component", "intervention", "share_weights")
_LORA_ALONE = ("alpha", "target_modules")


def make_config(job: TrainingJob) -> PeftConfig:
    """Return the config of a job's adapter.

    Raises:
        ReftError: a setting that the method does not have, or that contradicts it.
    """
    if job.method == LORA:
        _refuse(job, _REFT_ALONE, "LoRA has no such setting")
        modules = job.target_modules.split(";") if job.target_modules else None
        if job.rank < 1:
            raise ReftError(f"rank: expected 1 or more, got {job.rank}.")
        return LoraConfig(r=job.rank, lora_alpha=job.alpha, lora_dropout=job.dropout, target_modules=modules)
    _refuse(job, _LORA_ALONE, "it is LoRA's; representation edits have no such setting")
    formula = METHODS[job.method] if job.method else None
    if formula and job.intervention not in (formula, _default("intervention")):
        raise ReftError(
            f"intervention: the method {job.method!r} is the formula {formula!r}, got {job.intervention!r}."
        )
    return ReftConfig(
        layers=job.layers,
        positions=job.positions,
        component=job.component,
        intervention=formula or job.intervention,
        low_rank_dimension=job.rank,
        share_weights=job.share_weights,
        dropout=job.dropout,
    )


def attach(model: nn.Module, config: PeftConfig, base: str | None) -> PeftModel:
    """Put a new adapter on a base model.

    Args:
        base: the base model's name; a directory is remembered so that it is found from anywhere.

    Raises:
        ReftError: an adapter that does not fit the model.
    """
    known_as = os.path.abspath(base) if base and os.path.isdir(base) else None
    if isinstance(config, ReftConfig):
        config.base_model_name_or_path = known_as or config.base_model_name_or_path
        return get_reft_model(model, config)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ReftError(f"target_modules: LoRA does not fit this model: {error}") from None
    config.base_model_name_or_path = known_as or config.base_model_name_or_path
    return adapted


def heads_of(model: nn.Module) -> list[str]:
    """The names of a classifier's modules beside its backbone, which are trained with any adapter."""
    backbone = model.base_model_prefix
    return [
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    ]


def save(model: PeftModel, directory: str | Path, beside: Callable[[str], object] = lambda directory: None) -> None:
    """Save an adapter and what `beside` writes with it, completely or not at all; see `files.together`."""

    def write(staged: str) -> None:
        if isinstance(model, ReftModel):
            model.save(staged)
        else:
            model.save_pretrained(staged)
        beside(staged)

    save_together(directory, write)


def count(model: PeftModel) -> int:
    """How many parameters a new adapter has, without a classifier's head."""
    if isinstance(model, ReftModel):
        return model.count_parameters()
    return sum(parameter.numel() for name, parameter in model.named_parameters() if f"{LORA}_" in name)


def count_saved(directory: str | os.PathLike) -> int:
    """How many parameters a saved adapter has, without a classifier's head."""
    heads = set(read_config_data(directory).get("modules_to_save") or ())
    shapes = read_shapes(directory)
    return sum(math.prod(shape) for name, shape in shapes.items() if not heads & set(name.split(".")))


def title(directory: str | os.PathLike) -> str | None:
    """The paper's name for the method of a saved adapter: LoReFT, DiReFT, LoRA; none of another."""
    data = read_config_data(directory)
    if data.get("peft_type") == ReftPeftType.REFT.value:
        return {"loreft": "LoReFT", "nodireft": "DiReFT"}.get(str(data.get("intervention")))
    return "LoRA" if data.get("peft_type") == "LORA" else None


def check_same(checkpoint: str, now: PeftConfig) -> None:
    """Refuse to go on from a checkpoint that was made with other settings.

    Raises:
        ReftError: naming the first setting that differs.
    """
    before = read_config(checkpoint) if isinstance(now, ReftConfig) else PeftConfig.from_pretrained(checkpoint)
    for name in _SAME_REFT if isinstance(now, ReftConfig) else _SAME_LORA:
        old, new = getattr(before, name, None), getattr(now, name)
        if old != new:
            what = f"with {name} = {old!r}, now it is {new!r}"
            if name == "base_model_shape":
                what = f"for another base model: this one has {shape_differences(old, new)}"
            raise ReftError(
                f"resume: {checkpoint} was made {what}; resume with the same settings, or train to another output."
            )


def _refuse(job: TrainingJob, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if (value := getattr(job, name)) != _default(name):
            raise ReftError(f"{name}: {why}, got {value!r}; leave it out.")


def _default(name: str) -> Any:
    return getattr(TrainingJob, name)
