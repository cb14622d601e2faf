"""What an adapted model has: its edited layers, its interventions, its edits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..interventions import Intervention
from .layer import ReftLayer
from .registry import Edits


def reft_layers(model: nn.Module) -> list[ReftLayer]:
    """The edited places of a model."""
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def interventions_of(model: nn.Module, adapter_name: str) -> dict[str, Intervention]:
    """The interventions of an adapter by their places, in the order of its representations."""
    named: dict[int, tuple[str, Intervention]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ReftLayer):
            named |= {index: (f"{name}.{index}", module) for index, module in layer.of(adapter_name)}
    return dict(named[index] for index in sorted(named))


def penalty(model: nn.Module) -> Tensor | None:
    """What the active interventions add to the training loss after a forward, a scalar; none if nothing.

    `ReftTrainer` adds it. In a loop of one's own, add it to the loss before the backward.
    """
    layers = reft_layers(model)
    edits = (edit for layer in layers for name in layer.enabled_adapters for _, edit in layer.of(name))
    terms = [term for edit in edits if isinstance(edit, Intervention) and (term := edit.penalty()) is not None]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def edits_of(model: nn.Module) -> Edits | None:
    """The edits of an adapted model, none if it has no representation edits."""
    return next((module.edits for module in model.modules() if isinstance(module, ReftLayer)), None)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules and all in them in evaluation, without dropout, each of them afterwards in the mode it was in."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
