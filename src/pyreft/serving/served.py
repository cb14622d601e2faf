"""What an engine needs of an adapter's directory: its edited places and rules, and later its weights.

Everything that cannot be served is refused here, by its name and before an engine sees it.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from ..errors import ReftError
from ..files.adapter import parse_config, read_config_text
from ..interventions import orthonormal_columns
from ..positions import Positions
from .affine import Edit, affine, check_form, rank_of
from .tokens import Pattern, Place, Row, same

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMPONENTS = ("block_input", "block_output")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.reft_(input|output)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class _Part:
    """One representation: where it stands, and how its tensors are called."""

    place: Place
    layer: int  # and side and number: the end of the module's path in the file's names
    side: str
    number: int
    intervention: str
    act: str | None
    rank: int  # of its form
    shapes: dict[str, tuple[int, ...]]  # of its parameters


@dataclass(frozen=True)
class Adapter:
    """An adapter as an engine sees it. Made by `read_adapter`.

    Args:
        digest: of its config and weights: what it computes, whatever it is called.
        directory: its files, which do not change.
        rules: its position rules, each once.
        pattern: its edited places, each with the number of its rule.
        rank: how many coordinates a slot needs for it.
        shape: type and sizes of its base model.
    """

    digest: str
    directory: Path
    rules: tuple[Positions, ...]
    pattern: Pattern
    rank: int
    shape: dict[str, Any]
    parts: tuple[_Part, ...]

    def row(self, slot: int, prompt: int, strength: float = 1.0) -> Row:
        """A request with this adapter, for `plan`."""
        return Row(slot, self.pattern, self.rules, prompt, strength)

    @property
    def beyond_low_rank(self) -> str:
        """What of it is more than one product of low rank at each place, in words; an empty text for nothing."""
        for part in self.parts:
            if not part.rank:
                return f"the intervention {part.intervention!r}"
            if part.act is not None and rank_of(part.intervention, 1, None):
                return f"the activation {part.act!r}"
            if part.place.stage:
                return f"a second edit behind block {part.place.layer}"
        return ""

    def edits(self) -> dict[Place, Edit]:
        """Read the weights, as edits by place.

        Raises:
            ReftError: a file that is damaged or does not fit its config.
        """
        parts = _sort_tensors(self.directory, _read_tensors(self.directory), self.parts)
        free: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}
        for tensors in parts:
            if "rotate_layer.free" in tensors:
                free.setdefault(tuple(tensors["rotate_layer.free"].shape), []).append(tensors)
        for group in free.values():  # one batched call for all layers
            made = orthonormal_columns(torch.stack([tensors["rotate_layer.free"] for tensors in group])).mT
            for tensors, rotation in zip(group, made, strict=True):
                tensors["R"] = rotation
        return {
            part.place: affine(part.intervention, tensors, part.act)
            for part, tensors in zip(self.parts, parts, strict=True)
        }


def digest_of(config: bytes, weights: bytes) -> str:
    """The digest of an adapter's files."""
    return hashlib.sha256(len(config).to_bytes(8, "big") + config + weights).hexdigest()


def read_adapter(directory: str | os.PathLike, digest: str | None = None) -> Adapter:
    """Read what a directory says, all but the weights.

    Args:
        directory: an adapter's.
        digest: of its files, if it is known.

    Raises:
        ReftError: no adapter of representation finetuning, or one that cannot be served.
    """
    path = Path(directory)
    text = read_config_text(path)
    key = hashlib.sha256(text.encode()).digest()
    known = _described.get(key)
    if known is None:
        if len(_described) >= 256:
            _described.clear()
        known = _described[key] = _describe(text, path)
    if digest is None:
        digest = digest_of((path / CONFIG).read_bytes(), _weights_bytes(path))
    return replace(known, digest=digest, directory=path)


_described: dict[bytes, Adapter] = {}  # by the digest of a config, which many tenants have in common


def _describe(text: str, path: Path) -> Adapter:
    """What a config says that was read in a directory, as an adapter without a digest."""
    config = parse_config(text, path / CONFIG)
    shape = config.base_model_shape or {}
    if not shape.get("num_hidden_layers") or not shape.get("hidden_size"):
        raise ReftError(f"{path}: the config does not say what base model it is for; save it again from the model.")
    if config.modules_to_save:
        raise ReftError(f"{path}: modules_to_save: the trained {config.modules_to_save} cannot be served, only edits.")
    parts: list[_Part] = []
    rules: list[Positions] = []
    pattern: dict[Place, int] = {}
    numbers: dict[tuple[int, str], int] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # by an edit's settings
    entries = config.expand(shape["num_hidden_layers"])
    for entry in sorted(entries, key=lambda entry: entry.component != "block_output"):  # before the next block's input
        layer, rule = _check_entry(path, entry, shape["num_hidden_layers"])
        side = entry.component.removeprefix("block_")
        number = numbers[layer, side] = numbers.get((layer, side), -1) + 1
        behind = layer if side == "output" else layer - 1
        place = Place(behind, len([at for at in pattern if at.layer == behind]))
        if rule not in rules:
            rules.append(rule)
        pattern[place] = rules.index(rule)
        rank = rank_of(entry.intervention, entry.low_rank_dimension, entry.act_fn)
        settings = repr(replace(entry, layer=0, component="", positions=None, side=None))
        if settings not in shapes:  # most adapters have one kind of edit, in many layers
            shapes[settings] = _shapes(entry, shape["hidden_size"])
        parts.append(_Part(place, layer, side, number, entry.intervention, entry.act_fn, rank, shapes[settings]))
    return Adapter("", path, tuple(rules), same(pattern), max(part.rank for part in parts), shape, tuple(parts))


def check_fits(adapter: Adapter, rank: int, shape: dict[str, Any]) -> None:
    """Refuse an adapter that does not fit an engine.

    Args:
        rank: of the engine's slots.
        shape: type and sizes of its base model.

    Raises:
        ReftError: one of another base model, or of a rank above the slots'.
    """
    other = [f"{name} {shape[name]!r}" for name in shape if adapter.shape.get(name) != shape[name]]
    if other:
        asked = ", ".join(f"{name} {adapter.shape.get(name)!r}" for name in shape)
        raise ReftError(f"The adapter is for another base model, with {asked}; the engine's has {', '.join(other)}.")
    if adapter.rank > rank:
        raise ReftError(
            f"the adapter needs a rank of {adapter.rank}, the engine's slots have "
            f"{rank}; start it with --rank {adapter.rank}.",
            setting="low_rank_dimension",
        )


def _check_entry(path: Path, entry: Any, layers: int) -> tuple[int, Positions]:
    """The layer and the rule of a representation, if it can be served."""
    if entry.reads_input:
        raise ReftError(
            f"{path}: intervention: {entry.intervention!r} cannot be served: it reads what a linear layer inside of a "
            "block reads, and an engine fuses what is inside."
        )
    if entry.component not in COMPONENTS:
        raise ReftError(
            f"{path}: component: {entry.component!r} cannot be served, only {' and '.join(COMPONENTS)}: an engine "
            "fuses what is inside a block."
        )
    if not isinstance(entry.layer, int) or not 0 <= entry.layer < layers:
        raise ReftError(f"{path}: layer: expected one of 0 to {layers - 1}, got {entry.layer!r}.")
    rule = entry.rule()
    if rule is None:
        raise ReftError(
            f"{path}: positions: its locations come with each call, which cannot be served; give it a rule."
        )
    if rule.own:
        raise ReftError(f"{path}: positions: the rule {rule.own!r} of your own cannot be served.")
    try:
        check_form(entry.intervention, entry.act_fn)
    except ReftError as error:
        raise ReftError(f"{path}: {error}") from None
    return entry.layer, rule


def _shapes(entry: Any, width: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in entry.make(width).state_dict().items()}


def _weights_bytes(path: Path) -> bytes:
    try:
        return (path / WEIGHTS).read_bytes()
    except FileNotFoundError:
        raise ReftError(f"{path}: the adapter has no {WEIGHTS}; was it copied completely?") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(_weights_bytes(path))
    except (SafetensorError, ValueError) as error:
        message = f"{path / WEIGHTS}: the file is damaged or was cut short ({error}). Save or copy it again."
        raise ReftError(message) from None


def _sort_tensors(path: Path, tensors: dict[str, Tensor], parts: Sequence[_Part]) -> list[dict[str, Tensor]]:
    """The tensors of each part by the names of its parameters, float32."""
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    if tensors and not torch.cat([tensor.flatten() for tensor in tensors.values()]).isfinite().all():
        key = next(key for key, tensor in tensors.items() if not tensor.isfinite().all())
        raise ReftError(f"{path}: {key} has values that are not finite.")
    found: dict[tuple[int, str, int], dict[str, Tensor]] = {}
    modules: dict[tuple[int, str], str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        layer = match and re.search(r"\.(\d+)$", match[1])
        if not match or not layer:
            raise ReftError(f"{path}: the file does not fit its config: {key} is not known.")
        if modules.setdefault((int(layer[1]), match[2]), match[1]) != match[1]:
            raise ReftError(f"{path}: edits of two stacks cannot be served, only those of a decoder alone.")
        found.setdefault((int(layer[1]), match[2], int(match[3])), {})[match[4]] = tensor
    asked = [(part.layer, part.side, part.number) for part in parts]
    if set(asked) != found.keys():
        raise ReftError(
            f"{path}: the file does not fit its config: {len(set(asked) - found.keys())} edits are missing, "
            f"{len(found.keys() - set(asked))} are not known."
        )
    for part, where in zip(parts, asked, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in found[where].items()}
        if shapes != part.shapes:
            raise ReftError(f"{path}: the edit of layer {part.layer} has {shapes}, its config asks for {part.shapes}.")
    return [found[key] for key in asked]
