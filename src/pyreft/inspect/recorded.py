"""What an adapter does on given rows: the states h that each of its interventions saw, and its edits h' - h of them.

Everything that is looked at later is computed from this record. The model is run as it is, with hooks that only read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from ..places.lookup import Columns
from ..places.structure import has_stacks
from ..positions import Positions
from ..tuner.adapted import edits_of, evaluating
from ..tuner.call import Call, innermost
from ..tuner.layer import ReftLayer
from .examples import Row, batches, check_edited


@dataclass(frozen=True)
class Place:
    """One edited place of an adapter.

    Args:
        index: its number among the adapter's representations.
        layer, component, head, positions: as the config says.
        path, side: the module whose input or output is edited.
        columns: which part of the width; none for all of it.
        rule: the position rule.
    """

    index: int
    layer: int | None
    component: str
    head: int | None
    positions: str | None
    path: str
    side: str
    columns: Columns | None
    rule: Positions | None

    @property
    def site(self) -> tuple[str, str, Columns | None]:
        """What two places have in common that edit the same states."""
        return self.path, self.side, self.columns


@dataclass(frozen=True)
class PlaceEdits:
    """The edits of one place: of `n` tokens in all rows, ordered by row and token.

    Args:
        place: where.
        rows, tokens: the row and the index in it of each edited token, `[n]`.
        before: the states h, `[n, width]` in float32.
        edit: h' - h, `[n, width]` in float32, with the adapter's strength in it.
    """

    place: Place
    rows: Tensor
    tokens: Tensor
    before: Tensor
    edit: Tensor


@dataclass(frozen=True)
class RecordedEdits:
    """The edits of an adapter on rows of tokens, by place in the order of its representations."""

    adapter_name: str
    rows: list[Row]
    places: list[PlaceEdits]


def record_edits(
    model: Any, rows: Sequence[Row], *, adapter_name: str | None = None, batch_size: int = 8
) -> RecordedEdits:
    """Run a model on rows and return what an adapter edits, with which states it began.

    States are kept in memory: two times places x tokens x width numbers.

    Args:
        model: a `ReftModel`; it is run in evaluation mode, and left as it was.
        rows: see `text_rows` and `read_rows`.
        adapter_name: one of the active adapters; not needed where only one is.
        batch_size: how many rows are run at once.

    Raises:
        ReftError: no such active adapter, an encoder-decoder model, or a row of which no token is edited.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    edits = edits_of(base)
    active = edits.active if edits is not None else []
    name = active[0] if adapter_name is None and len(active) == 1 else adapter_name
    if edits is None or name not in active:
        raise ReftError(
            f"expected one of the active adapters ({', '.join(active) or 'there is none'}), got "
            f"{name!r}; activate it with model.set_adapter(...).",
            setting="adapter_name",
        )
    if has_stacks(base):
        raise ReftError(f"{type(base).__name__}: a model with an encoder and a decoder cannot be looked at yet.")
    check_edited(edits.rules[name], rows)
    recorder = _Recorder(base, name, model.peft_config[name])
    try:
        with evaluating([model]), torch.no_grad():
            for number, batch in enumerate(batches(rows, batch_size, next(base.parameters()).device)):
                recorder.first_row = number * batch_size
                model(**batch)
    finally:
        recorder.remove()
    return RecordedEdits(name, list(rows), recorder.edits())


class _Recorder:
    """Hooks on the interventions of an adapter that keep what goes in and what comes out."""

    def __init__(self, base: nn.Module, name: str, config: Any) -> None:
        self.first_row = 0
        self._kept: dict[int, list[tuple[Tensor, ...]]] = {}
        self._places: dict[int, Place] = {}
        self._handles = []
        entries = config.expand((config.base_model_shape or {}).get("num_hidden_layers", 0))
        for path, layer in base.named_modules():
            if not isinstance(layer, ReftLayer) or name not in layer:
                continue
            for (index, intervention), columns in zip(layer.of(name), layer.columns[name], strict=True):
                entry, rule = entries[index], layer.edits.rules[name][index]
                at = f"{entry.positions} ({entry.side})" if entry.side else entry.positions
                self._places[index] = Place(
                    *(index, entry.layer, entry.component, entry.head, at),
                    *(path.rpartition(".")[0], layer.side, columns, rule),
                )
                self._kept[index] = []
                self._handles.append(intervention.register_forward_hook(self._keep(layer, (name, index))))

    def _keep(self, layer: ReftLayer, key: tuple[str, int]) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor], edited: Tensor) -> None:
            call = innermost(layer.edits)
            assert isinstance(call, Call)
            reading, h = call.readings[""], args[0].float()
            assert reading is not None  # a forward over whole rows: the tokens are listed
            at: Any = reading.at[key]
            edit = call.strength(key[0]) * (edited.float() - h)
            rows, tokens = at.rows, at.places % reading.tokens
            self._kept[key[1]].append(tuple(t.cpu() for t in (rows + self.first_row, tokens, h, edit)))

        return keep

    def edits(self) -> list[PlaceEdits]:
        """What was kept; places of which no token was edited are left out."""
        return [
            PlaceEdits(place, *(torch.cat(parts) for parts in zip(*self._kept[index], strict=True)))
            for index, place in sorted(self._places.items())
            if self._kept[index]
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def place_names(places: Sequence[Place]) -> list[str]:
    """Return a short name for each place: what tells it apart from the others, and always the layer."""
    several = {name for name in ("component", "positions") if len({getattr(place, name) for place in places}) > 1}
    names = []
    for place in places:
        words = [] if place.layer is None else [f"layer {place.layer}"]
        if "component" in several or place.layer is None:
            words.append(place.component)
        if place.head is not None:
            words.append(f"head {place.head}")
        if "positions" in several:
            words.append(str(place.positions))
        names.append(", ".join(words))
    return names
