"""What a `ReftModel` of the original had beside its calls and files: interventions, counts, gradients, devices."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn

from ..files.original import legacy_keys
from ..tuner.adapted import interventions_of, reft_layers
from ..tuner.config import ReftConfig
from ..tuner.representation import Representation


class OriginalMembers(PeftModel):
    """A PEFT model with representation edits and the members that the original's callers use."""

    @property
    def interventions(self) -> nn.ModuleDict:
        """The active adapter's interventions by the original's keys, in the order of its representations."""
        modules = interventions_of(self, self.active_adapter).values()
        return nn.ModuleDict(dict(zip(self.sorted_keys, modules, strict=True)))

    @property
    def representations(self) -> dict[str, Representation]:
        """What the active adapter edits, by the original's keys; `config` is the base model's."""
        config: ReftConfig = self.peft_config[self.active_adapter]
        entries = config.expand((config.base_model_shape or {})["num_hidden_layers"])
        return dict(zip(legacy_keys(entries), entries, strict=True))

    @property
    def sorted_keys(self) -> list[str]:
        """The keys of `interventions`, in whose order a call gives locations."""
        return list(self.representations)

    @property
    def model_config(self) -> Any:
        """The config of the base model."""
        return self.config

    def count_parameters(self, include_model: bool = False) -> int:
        """How many parameters are trained: those of the interventions, with `include_model` any others, too."""
        modules = [self] if include_model else reft_layers(self)
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, and their share of the base model's."""
        own = {p for layer in reft_layers(self) for p in layer.parameters()}  # one may be that of several places
        edits, trained = sum(p.numel() for p in own if p.requires_grad), self.count_parameters(include_model=True)
        base = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in own)
        print(
            f"trainable intervention params: {edits:,d} || trainable model params: {trained - edits:,d}\n"
            f"model params: {base:,d} || trainable%: {100 * trained / base}"
        )

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, for an optimiser of one's own."""
        return [p for p in self.parameters() if p.requires_grad]

    def set_zero_grad(self) -> None:
        """Drop the gradients of the interventions."""
        for layer in reft_layers(self):
            layer.zero_grad()

    def disable_model_gradients(self) -> None:
        """Freeze the base model, not what an adapter trains."""
        for _, parameter in base_parameters(self):
            parameter.requires_grad_(False)

    def enable_model_gradients(self) -> None:
        """Train the base model, too. Files of an adapter do not hold it: save it apart."""
        for _, parameter in base_parameters(self):
            parameter.requires_grad_(True)

    def set_device(self, device: str | torch.device, set_model: bool = True) -> Self:
        """Move the interventions, and with `set_model` the base model, to a device."""
        for module in [self] if set_model else reft_layers(self):
            module.to(device)
        return self

    def get_device(self) -> torch.device:
        """The device of the base model."""
        return next(self.get_base_model().parameters()).device


def base_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base model, with those of a LoRA beneath, but for those that its edits hold or replace."""
    own = (*reft_layers(model), *model.base_model.reft_heads())
    held = {id(parameter) for module in own for parameter in module.parameters()}
    for name, parameter in model.get_base_model().named_parameters():
        if id(parameter) not in held:
            yield name, parameter
