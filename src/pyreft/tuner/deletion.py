"""Deleting an adapter: its interventions and trained heads go, and another one becomes active, as with LoRA."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from peft.functional import set_adapter
from peft.utils.other import AuxiliaryTrainingWrapper


def delete_edits(
    name: str, others: Iterable[str], layers: Sequence[Any], heads: Sequence[AuxiliaryTrainingWrapper]
) -> list[str]:
    """Delete an adapter from the places it edits and from the modules it trains beside.

    PEFT passes over our layers, which it takes for parameters of their own, and then switches all heads off.

    Args:
        name: of the adapter.
        others: the names of those that stay.
        layers: the `ReftLayer`s of the model.
        heads: what adapters train beside their edits.

    Returns:
        The adapters that are active then: those that were, or else the first of the others by name.
    """
    active = list(dict.fromkeys(other for layer in layers for other in layer.active_adapters))
    left = [other for other in active if other != name]
    for layer in layers:
        if name in layer:
            del layer[name]
            for known in (layer.indices, layer.columns):
                known.pop(name, None)
    for head in heads:
        head.delete_adapter(name, new_active_adapters=[other for other in head.active_adapters if other != name])
    if name not in active:
        return left
    if not left and (left := sorted(others)[:1]):
        message = f"Adapter {name} was active which is now deleted. Setting active adapter to {left[0]}."
        warnings.warn(message, UserWarning, stacklevel=4)
    for head in heads if left else ():
        set_adapter(head, left)
    for layer in layers:
        layer.set_adapter(left)
    return left
