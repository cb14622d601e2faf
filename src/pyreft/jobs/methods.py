"""The methods that a job can train: representation edits, or LoRA on the same data to compare them with."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from .. import pocket
from ..errors import ReftError
from ..files.adapter import EMBEDDED, read_config_data, read_shapes, remembered
from ..files.together import save_together
from ..interventions import intervention_class, setting_names, short_name
from ..model import ReftModel, get_reft_model
from ..tuner.config import ReftConfig, ReftPeftType
from ..tuner.injection import base_model_shape
from .settings import LORA, REFT_ALONE, TrainingJob

_LORA_ALONE = ("target_modules",)
_RANK, _ALPHA = 8, 16  # of the method lora


def make_config(job: TrainingJob) -> PeftConfig:
    """Return the config of a job's adapter.

    Raises:
        ReftError: a setting that the method does not have, or that contradicts it.
    """
    if job.method == LORA:
        _refuse(job, REFT_ALONE, "LoRA has no such setting")
        modules = job.target_modules.split(";") if job.target_modules else None
        rank = _RANK if job.rank is None else job.rank
        if rank < 1:
            raise ReftError(f"expected 1 or more, got {rank}.", setting="rank")
        return LoraConfig(
            r=rank,
            lora_alpha=_ALPHA if job.alpha is None else job.alpha,
            lora_dropout=job.edit_dropout,
            target_modules=modules,
        )
    formula = job.formula or ""
    scaled = "alpha" in setting_names(intervention_class(formula))[0]
    alone = _LORA_ALONE if scaled else ("alpha", *_LORA_ALONE)
    _refuse(job, alone, "it is LoRA's; representation edits have no such setting")
    if job.intervention is not None and short_name(intervention_class(job.intervention)) != formula:
        raise ReftError(
            f"the method {job.method!r} is the formula {formula!r}, got {job.intervention!r}.", setting="intervention"
        )
    return ReftConfig(
        layers=job.layers,
        positions=job.positions,
        component=job.component,
        intervention=formula,
        low_rank_dimension=job.rank,
        share_weights=job.share_weights,
        dropout=job.edit_dropout,
        intervention_kwargs=None if job.alpha is None else {"alpha": job.alpha},
    )


def learning_rate(job: TrainingJob, model: nn.Module) -> float:
    """The learning rate of a job, or if it has none what suits its formula and the base model.

    It is 0.001, and for LoRA at located tokens 0.008, which served widths of 192 and 576 (`benchmarks/RESULTS.md`). On
    wider models that falls as 1/width, since a step of A is felt by as many numbers at once; that is not measured. From
    a rank of 4 on it falls as 1/√rank, since each step moves as many directions: a rank of 16 learns less at 0.008.
    """
    if job.lr is not None:
        return job.lr
    if job.formula != "lora":
        return 1e-3
    width = base_model_shape(model)["hidden_size"] or 0
    return float(f"{8e-3 * 576 / max(width, 576) / math.sqrt(max(job.rank or 1, 4) / 4):.2g}")


def attach(model: nn.Module, config: PeftConfig, base: str | None) -> PeftModel:
    """Put a new adapter on a base model.

    Args:
        base: the base model's name; a directory is remembered so that it is found from anywhere, a copy in the hub's
            cache by its name there. Edits remember the embedded model as `pocket`; of a LoRA, PEFT looks for the name.

    Raises:
        ReftError: an adapter that does not fit the model.
    """
    known_as = remembered(os.path.abspath(base)) if base and os.path.isdir(base) else None
    if isinstance(config, ReftConfig):
        embedded = base in (None, EMBEDDED) or known_as == pocket.path()
        config.base_model_name_or_path = EMBEDDED if embedded else known_as
        return get_reft_model(model, config)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ReftError(f"LoRA does not fit this model: {error}", setting="target_modules") from None
    config.base_model_name_or_path = known_as or config.base_model_name_or_path
    return adapted


def classifier_of(model: nn.Module) -> list[str]:
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
    """How many parameters a new adapter has, without those of a classifier."""
    if isinstance(model, ReftModel):
        return model.count_parameters()
    return sum(parameter.numel() for name, parameter in model.named_parameters() if f"{LORA}_" in name)


def count_saved(directory: str | os.PathLike) -> int:
    """How many parameters a saved adapter has, without those of a classifier."""
    classifier = set(read_config_data(directory).get("modules_to_save") or ())
    shapes = read_shapes(directory)
    return sum(math.prod(shape) for name, shape in shapes.items() if not classifier & set(name.split(".")))


def title(directory: str | os.PathLike) -> str | None:
    """The paper's name for the method of a saved adapter: LoReFT, DiReFT, LoRA; none of another."""
    data = read_config_data(directory)
    if data.get("peft_type") == ReftPeftType.REFT.value:
        return {"loreft": "LoReFT", "nodireft": "DiReFT"}.get(str(data.get("intervention")))
    return "LoRA" if data.get("peft_type") == "LORA" else None


def _refuse(job: TrainingJob, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if (value := getattr(job, name)) != _default(name):
            raise ReftError(f"{why}, got {value!r}; leave it out.", setting=name)


def _default(name: str) -> Any:
    return getattr(TrainingJob, name)
