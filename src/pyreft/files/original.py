"""Checkpoints of the original: what `save` of pyreft 0.1.0 and its trainers wrote.

`config.json` lists the edited places, a pickle `intkey_<key>.bin` for each of them holds the tensors of its
intervention, and `pytorch_model.bin` trained parameters of the base model, if any.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import INTERVENTIONS, Intervention, LowRankIntervention, NoreftIntervention
from ..interventions.original_names import SIZES, named_as_here
from ..tuner.config import ReftConfig
from ..tuner.representation import Representation
from ..tuner.values import check_values
from .adapter import is_adapter
from .pickles import read_pickle
from .text import LARGEST, read_json

CONFIG = "config.json"
MODEL = "pytorch_model.bin"
SUBFOLDER = "intervenable_model"  # where the original's trainers saved in each of their checkpoints

_COLUMNS = "the lists sorted_keys, intervention_types and representations (layer, component, ...)"
_TOLERANCE = 0.05  # rounding to bfloat16 leaves up to about 0.01

Values = list[tuple[nn.Parameter, Tensor]]  # parameters, and what a checkpoint has for them


def legacy_place(directory: str | os.PathLike) -> Path | None:
    """Return where files of the original are: in a directory, or in its `intervenable_model`.

    None if in neither, and of an adapter of this library.
    """
    if is_adapter(directory):
        return None
    for place in (Path(directory), Path(directory, SUBFOLDER)):
        if any(place.glob("intkey_*.bin")):
            return place
        config = place / CONFIG  # such a file stands beside many models
        if config.is_file() and config.stat().st_size <= LARGEST and b'"intervention_types"' in config.read_bytes():
            return place
    return None


def adapter_place(directory: str | os.PathLike) -> Path:
    """Return where an adapter is; callers of the original look in `intervenable_model` of a checkpoint, ours is not."""
    place = Path(directory)
    return place.parent if place.name == SUBFOLDER and not place.exists() and is_adapter(place.parent) else place


def read_legacy(place: Path, act_fn: str | None = None) -> ReftConfig:
    """Return the config of a checkpoint of the original, with its interventions ready and in their order.

    The files do not say at which tokens: the representations have no positions, so each call gives locations.
    Neither do they name the activation.

    A stored R may be rounded, as of a model in bfloat16: it is made orthonormal again.

    Args:
        place: see `legacy_place`.
        act_fn: the activation the interventions were made with, `"linear"` if none. If it is not given, none is
            assumed, with a warning where it could matter.

    Raises:
        ReftError: files that are missing or damaged, that do not fit each other, or an intervention not known here.
    """
    representations = []
    for key, name, layer, component in _read_places(place):
        state = _read_state(place, key)
        intervention = _make(_class(name, place), state, act_fn, place / _file(key))
        representations.append(Representation(layer=layer, component=component, intervention=intervention))
    config = ReftConfig(representations=representations)
    if act_fn is None and any(isinstance(entry.intervention.learned_source, nn.Linear) for entry in representations):
        warnings.warn(
            f"{place}: the original's files do not name the activation of the interventions; none is assumed. If "
            "they were made with one, name it: ReftModel.load(..., act_fn='relu'); if not, act_fn='linear' says so.",
            UserWarning,
            stacklevel=3,
        )
    return config


def read_interventions(
    place: Path, representations: Sequence[Representation], interventions: Iterable[Intervention]
) -> Values:
    """Return what a checkpoint of the original has for the interventions of these representations.

    It needs no `config.json`, which the original's trainers did not write.

    Raises:
        ReftError: files that are missing, damaged, or of other interventions.
    """
    interventions = list(interventions)
    if (place / CONFIG).is_file():
        theirs = [_class(name, place).__name__ for _, name, _, _ in _read_places(place)]
        ours = [type(intervention).__name__ for intervention in interventions]
        if theirs != ours:
            raise ReftError(f"{place}: expected the interventions of this model, {ours}; it holds {theirs}.")
    values: Values = []
    for key, intervention in zip(legacy_keys(representations), interventions, strict=True):
        values += _values(intervention, _read_state(place, key), place / _file(key))
    return values


def read_model(place: Path, parameters: Mapping[str, nn.Parameter]) -> Values:
    """Return what the original trained of the base model and saved with `include_model=True`.

    Raises:
        ReftError: there is no such file, it is damaged, or it holds parameters that the model does not have.
    """
    file = place / MODEL
    if not file.is_file():
        raise ReftError(f"{place}: it has no {MODEL}, so nothing of the base model; use include_model=False.")
    tensors = read_pickle(file)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ReftError(f"{file}: the base model has no parameter {name!r} of the shape {list(tensor.shape)}.")
        check_values(f"{file}: {name}", tensor, parameters[name].is_floating_point())
    return [(parameters[name], tensor) for name, tensor in tensors.items()]


@contextmanager
def all_or_none(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Write into tensors; if that fails or is interrupted, they are as they were."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise


@torch.no_grad()
def fill(values: Values) -> None:
    """Write values into their parameters, all of them or none."""
    with all_or_none(parameter for parameter, _ in values):
        for parameter, value in values:
            parameter.copy_(value)


def legacy_keys(representations: Sequence[Representation]) -> list[str]:
    """Return the keys by which the original names interventions; those of one place are numbered.

    >>> legacy_keys([Representation(layer=2), Representation(layer=2)])[1]
    'layer_2_comp_block_output_unit_pos_nunit_1#1'
    """
    keys, seen = [], Counter[str]()
    for entry in representations:
        place = f"comp_{entry.component.replace('.', '_')}"
        if "." not in entry.component:
            place = f"layer_{entry.layer}_{place}"
        keys.append(f"{place}_unit_pos_nunit_1#{seen[place]}")
        seen[place] += 1
    return keys


def _file(key: str) -> str:
    return f"intkey_{key}.bin"


def _read_places(place: Path) -> list[tuple[str, str, int | None, str]]:
    """(key, class, layer, component) of each intervention, in order."""
    path = place / CONFIG
    if not path.is_file():
        raise ReftError(
            f"{place}: it holds interventions of the original without a {CONFIG}, as its trainers wrote them. Make "
            "the model with the config it was trained with, get_reft_model(model, config), then use its "
            "load_intervention()."
        )
    data = read_json(path, _COLUMNS)
    try:
        columns = (data[name] for name in ("sorted_keys", "intervention_types", "representations"))
        rows = [(key, name, *entry[:2]) for key, name, entry in zip(*columns, strict=True)]
        fits = all(
            isinstance(key, str) and isinstance(name, str) and type(layer) in (int, NoneType) and isinstance(comp, str)
            for key, name, layer, comp in rows
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ReftError(f"{path}: expected {_COLUMNS}, one entry for each intervention, as pyreft 0.1.0 writes them.")
    return rows


def _class(name: str, place: Path) -> type[LowRankIntervention]:
    """The class of a name such as `<class 'pyreft.interventions.LoreftIntervention'>`, of those the original had."""
    known = [cls for cls in INTERVENTIONS.values() if issubclass(cls, LowRankIntervention)]
    ours = {f"<class 'pyreft.interventions.{cls.__name__}'>": cls for cls in known}
    if name not in ours:
        raise ReftError(
            f"{place / CONFIG}: the intervention {name} is not one of pyreft's "
            f"({', '.join(cls.__name__ for cls in known)}), so its formula is not known. Load it "
            "with the program that made it."
        )
    return ours[name]


def _read_state(place: Path, key: str) -> dict[str, Tensor]:
    """The parameters of one intervention, under our names and in float32."""
    file = place / _file(key)
    found = {name: tensor for name, tensor in read_pickle(file).items() if name not in SIZES}
    for name, tensor in found.items():
        check_values(f"{file}: {name}", tensor)
    try:
        return named_as_here({name: tensor.float() for name, tensor in found.items()})
    except ReftError as error:
        raise ReftError(error.problem, where=str(file)) from None


def _make(cls: type[LowRankIntervention], state: dict[str, Tensor], act_fn: str | None, file: Path) -> Intervention:
    """An intervention with the sizes and the values of a stored state."""
    free = issubclass(cls, NoreftIntervention)  # W₂ stands in the place of R
    basis = state.get("proj_layer.weight" if free else "rotate_layer.free")
    if basis is None or basis.dim() != 2:
        raise ReftError(f"{file}: expected the tensors of {cls.__name__}, found {_listed(state)}.")
    width, rank = basis.T.shape if free else basis.shape
    bias = "proj_layer.bias" in state
    intervention = cls(embed_dim=width, low_rank_dimension=rank, act_fn=act_fn, add_bias=bias)
    fill(_values(intervention, state, file))
    return intervention


def _values(intervention: Intervention, state: dict[str, Tensor], file: Path) -> Values:
    expected = dict(intervention.named_parameters())
    if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in state.items()}:
        raise ReftError(
            f"{file}: expected the tensors of {type(intervention).__name__}, {_listed(expected)}; "
            f"found {_listed(state)}."
        )
    if "rotate_layer.free" in state:
        rotation = state["rotate_layer.free"]
        error = (rotation.T @ rotation - torch.eye(rotation.shape[1])).abs().max().item()
        if not error <= _TOLERANCE:  # NaN is not
            raise ReftError(
                f"{file}: expected a rotate_layer with orthonormal columns, up to {_TOLERANCE}; these are off by "
                f"{error:.2g}. The file is damaged; save or copy it again."
            )
    return [(expected[name], value) for name, value in state.items()]


def _listed(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(state.items())) or "none"
