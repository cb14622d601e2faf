"""What an engine needs of an adapter's directory: its edited places and rules, and later its weights.

Everything that cannot be served is refused here, by its name and before an engine sees it.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
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
from ..places.components import LINEAR
from ..places.lookup import Site
from ..positions import Positions
from .affine import Edit, affine, check_form, rank_of
from .tokens import Pattern, Place, Row, same

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMPONENTS = ("block_input", "block_output")
Sites = Callable[[str, int], Site]
"""Where a component of a block is in the base model, as `places.components.find_site` tells of linear layers."""
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
    shapes: dict[str, tuple[int | None, ...]]  # of its parameters; none for widths that the config does not tell
    scale: float | None = None  # α/r


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
    def parts_inside(self) -> list[str]:
        """The components that it edits inside of blocks."""
        return list(dict.fromkeys(part.place.part for part in self.parts if part.place.part))

    @property
    def beyond_low_rank(self) -> str:
        """What of it is more than one product of low rank at each place, in words; an empty text for nothing."""
        for part in self.parts:
            if not part.rank:
                return f"the intervention {part.intervention!r}"
            if part.act is not None and rank_of(part.intervention, 1, None):
                return f"the activation {part.act!r}"
            if part.place.part:
                return f"an edit of {part.place.part}, inside of a block,"
            if part.place.stage:
                return f"a second edit behind block {part.place.layer}"
        return ""

    def edits(self, sites: Sites | None = None) -> dict[Place, Edit]:
        """Read the weights, as edits by place.

        Args:
            sites: where the base model has what is edited inside of blocks; without it such edits are checked alone,
                as far as a file tells, and not among those that are returned.

        Raises:
            ReftError: a file that is damaged or does not fit its config.
        """
        parts = _sort_tensors(self.directory, _read_tensors(self.directory), self.parts, sites)
        free: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}
        for part, tensors in parts:
            if part.scale is not None:
                tensors["scale"] = torch.tensor(part.scale)
            if "rotate_layer.free" in tensors:
                free.setdefault(tuple(tensors["rotate_layer.free"].shape), []).append(tensors)
        for group in free.values():  # one batched call for all layers
            made = orthonormal_columns(torch.stack([tensors["rotate_layer.free"] for tensors in group])).mT
            for tensors, rotation in zip(group, made, strict=True):
                tensors["R"] = rotation
        return {part.place: affine(part.intervention, tensors, part.act) for part, tensors in parts}


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
    numbers: Counter[tuple[int, str]] = Counter()  # of edits in one module
    stages: Counter[tuple[int, str]] = Counter()  # of edits at one place
    made: dict[str, tuple[dict[str, tuple[int | None, ...]], float | None]] = {}  # by an edit's settings
    entries = config.expand(shape["num_hidden_layers"])
    for entry in sorted(entries, key=lambda entry: entry.component != "block_output"):  # before the next block's input
        layer, rule = _check_entry(path, entry, shape["num_hidden_layers"])
        part = entry.component if entry.reads_input else ""
        side = "output" if part else entry.component.removeprefix("block_")
        number = numbers[layer, part or side]
        numbers[layer, part or side] += 1
        behind = layer if side == "output" else layer - 1
        place = Place(behind, stages[behind, part], part)
        stages[behind, part] += 1
        if rule not in rules:
            rules.append(rule)
        pattern[place] = rules.index(rule)
        rank = rank_of(entry.intervention, entry.low_rank_dimension, entry.act_fn)
        settings = repr(replace(entry, layer=0, component="", positions=None, side=None))
        if settings not in made:  # most adapters have one kind of edit, in many layers
            made[settings] = _shapes(entry, shape["hidden_size"])
        parts.append(_Part(place, layer, side, number, entry.intervention, entry.act_fn, rank, *made[settings]))
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
    known = LINEAR if entry.reads_input else COMPONENTS
    if entry.component not in known:
        raise ReftError(
            f"{path}: component: {entry.component!r} of {entry.intervention!r} cannot be served, only "
            f"{', '.join(known)}."
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


def _shapes(entry: Any, width: int) -> tuple[dict[str, tuple[int | None, ...]], float | None]:
    """The shapes of an edit's parameters, and of LoRA its α/r."""
    with torch.device("meta"):
        made = entry.make(width, width)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    if not entry.reads_input:
        return shapes, None
    rank = made.low_rank_dimension
    return {"A.weight": (rank, None), "B.weight": (None, rank)}, made.alpha / rank


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


def _sort_tensors(
    path: Path, tensors: dict[str, Tensor], parts: Sequence[_Part], sites: Sites | None
) -> list[tuple[_Part, dict[str, Tensor]]]:
    """Each part with its tensors by the names of its parameters, float32; without sites those between blocks alone."""
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    if tensors and not torch.cat([tensor.flatten() for tensor in tensors.values()]).isfinite().all():
        key = next(key for key, tensor in tensors.items() if not tensor.isfinite().all())
        raise ReftError(f"{path}: {key} has values that are not finite.")
    found: dict[tuple[int | str, str, int], dict[str, Tensor]] = {}  # by block, or by the path of what is inside
    modules: dict[tuple[int, str], str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise ReftError(f"{path}: the file does not fit its config: {key} is not known.")
        layer = re.search(r"\.(\d+)$", match[1])
        if layer and modules.setdefault((int(layer[1]), match[2]), match[1]) != match[1]:
            raise ReftError(f"{path}: edits of two stacks cannot be served, only those of a decoder alone.")
        found.setdefault((int(layer[1]) if layer else match[1], match[2], int(match[3])), {})[match[4]] = tensor
    if sites is None:
        _check_inside(path, found, [part for part in parts if part.place.part])
        parts = [part for part in parts if not part.place.part]
        found = {key: values for key, values in found.items() if not isinstance(key[0], str)}
    asked = _asked(parts, sites)
    if set(asked) != found.keys():
        raise ReftError(
            f"{path}: the file does not fit its config: {len(set(asked) - found.keys())} edits are missing, "
            f"{len(found.keys() - set(asked))} are not known."
        )
    for part, where in zip(parts, asked, strict=True):
        shapes, expected = {name: tuple(tensor.shape) for name, tensor in found[where].items()}, part.shapes
        if sites is not None and part.place.part:
            site = sites(part.place.part, part.layer)
            expected = {"A.weight": (part.rank, site.input_width), "B.weight": (site.width, part.rank)}
        if shapes != expected:
            raise ReftError(f"{path}: the edit of layer {part.layer} has {shapes}, its config asks for {expected}.")
    return [(part, found[key]) for part, key in zip(parts, asked, strict=True)]


def _check_inside(
    path: Path, found: dict[tuple[int | str, str, int], dict[str, Tensor]], parts: Sequence[_Part]
) -> None:
    """Check what is edited inside of blocks as far as a file tells; which module each part is in, the model will."""
    there = [values for key, values in found.items() if isinstance(key[0], str)]
    if len(there) != len(parts):
        raise ReftError(
            f"{path}: the file does not fit its config: expected {len(parts)} edits inside of blocks, got {len(there)}."
        )
    ranks = sorted(part.rank for part in parts)
    try:
        fits = ranks == sorted(len(values["A.weight"]) for values in there)
        fits &= all(values["A.weight"].shape[0] == values["B.weight"].shape[1] and len(values) == 2 for values in there)
    except (KeyError, IndexError, TypeError):
        fits = False
    if not fits:
        raise ReftError(f"{path}: expected A of the ranks {ranks} and a B for each, as the config says.")


def _asked(parts: Sequence[_Part], sites: Sites | None) -> list[tuple[int | str, str, int]]:
    """Where in a file the tensors of each part are: block or path, side, and number among the edits there."""
    found: list[tuple[int | str, str, int]] = []
    counts: dict[str, int] = {}
    for part in parts:
        if sites is None or not part.place.part:
            found.append((part.layer, part.side, part.number))
        else:
            path = sites(part.place.part, part.layer).path
            found.append((path, part.side, counts.setdefault(path, 0)))
            counts[path] += 1
    return found
