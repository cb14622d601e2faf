"""The edits: small modules that map a hidden state h to h', and the table of their names."""

import inspect
from typing import Any

from torch import nn

from ..errors import ReftError, did_you_mean
from .intervention import Intervention, stack
from .lora import LoraIntervention
from .low_rank import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    LowRankIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .pyvene import (
    ConstantSourceIntervention,
    DistributedRepresentationIntervention,
    LocalistRepresentationIntervention,
    LowRankRotateLayer,
    SourcelessIntervention,
    TrainableIntervention,
    first_of_pair,
    settings_of,
    speaks_pyvene,
)
from .rank_one import Reftr1Intervention
from .rotation import OrthonormalColumns, orthonormal_columns, orthonormalize
from .vectors import BiasIntervention, JolaIntervention, LofitIntervention, RedIntervention, RoadIntervention

__all__ = [
    "INTERVENTIONS",
    "BiasIntervention",
    "ConsreftIntervention",
    "ConstantSourceIntervention",
    "DireftIntervention",
    "DistributedRepresentationIntervention",
    "Intervention",
    "JolaIntervention",
    "LobireftIntervention",
    "LocalistRepresentationIntervention",
    "LofitIntervention",
    "LoraIntervention",
    "LoreftIntervention",
    "LowRankIntervention",
    "LowRankRotateLayer",
    "NodireftIntervention",
    "NoreftIntervention",
    "OrthonormalColumns",
    "RedIntervention",
    "Reftr1Intervention",
    "RoadIntervention",
    "SourcelessIntervention",
    "TrainableIntervention",
    "intervention_class",
    "orthonormal_columns",
    "orthonormalize",
    "register",
    "setting_names",
    "settings_of",
    "short_name",
    "speaks_pyvene",
    "stack",
]

INTERVENTIONS: dict[str, type[Any]] = {}
"""By its name in configs and files, every known class."""

_OURS: dict[str, type[Any]] = {}


def short_name(cls: type[nn.Module]) -> str:
    """The name of a class in configs and files, such as `"loreft"`; a class of one's own is never called as ours."""
    name = cls.__name__.lower().removesuffix("intervention")
    return name if _same(_OURS.get(name, cls), cls) else f"own-{name}"


def _same(cls: type[Any], other: type[Any]) -> bool:
    """Whether two classes are one, or the same defined again, as in a notebook."""
    return (cls.__module__, cls.__qualname__) == (other.__module__, other.__qualname__)


def register(cls: type[Any]) -> type[Any]:
    """Let configs and files name a class of one's own; a file alone can never bring in a class.

    It is a subclass of `Intervention`, or a module in pyvene's shape (see `interventions.pyvene`). Passing the class to
    `ReftConfig(intervention=...)` or `ReftModel.load(..., interventions=[...])` does the same.

    Raises:
        ReftError: not an intervention, or another class has the name.
    """
    fits = isinstance(cls, type) and issubclass(cls, nn.Module)
    if not (fits and (issubclass(cls, Intervention) or speaks_pyvene(cls))):
        raise ReftError(
            "expected a subclass of pyreft.interventions.Intervention, or a module with "
            f"forward(base, source=None, subspaces=None), got {cls!r}.",
            setting="intervention",
        )
    name = short_name(cls)
    known = INTERVENTIONS.get(name, cls)
    if not _same(known, cls):
        raise ReftError(
            f"the name {name!r} of {cls!r} belongs to {known!r}; give the class another.", setting="intervention"
        )
    INTERVENTIONS[name] = cls  # the newer one, where a notebook defines a class again
    if not hasattr(cls, "__getitem__"):  # a class of pyvene's own
        cls.__getitem__ = first_of_pair
    return cls


for _cls in (
    LoreftIntervention,
    NoreftIntervention,
    ConsreftIntervention,
    LobireftIntervention,
    DireftIntervention,
    NodireftIntervention,
    RedIntervention,
    BiasIntervention,
    Reftr1Intervention,
    RoadIntervention,
    LofitIntervention,
    JolaIntervention,
    LoraIntervention,
):
    register(_cls)
_OURS.update(INTERVENTIONS)


def setting_names(cls: type[Any]) -> tuple[set[str], bool]:
    """The keyword arguments that a class takes, but for the widths, and whether it may take others, as in pyvene."""
    own = cls.__module__.startswith(f"{__package__}.") or (
        issubclass(cls, Intervention) and not issubclass(cls, LowRankIntervention)
    )
    parameters = inspect.signature(cls).parameters.values()
    names = (
        cls.setting_names()
        if issubclass(cls, Intervention)
        else {p.name for p in parameters} - {"embed_dim", "input_dim"}
    )
    return names, not own and any(p.kind is p.VAR_KEYWORD for p in parameters)


def intervention_class(name: str | type[Any]) -> type[Any]:
    """Return the class of a name such as `"loreft"` or `"LoreftIntervention"`; a class is registered.

    Raises:
        ReftError: an unknown name.
    """
    if isinstance(name, type):
        return register(name)
    key = str(name).lower().removesuffix("intervention")
    if key not in INTERVENTIONS:
        raise ReftError(
            f"expected one of {', '.join(INTERVENTIONS)}, got {name!r}."
            f"{did_you_mean(key, INTERVENTIONS)} A class of your own must be given to what loads the adapter, as in "
            "ReftModel.load(..., interventions=[MyIntervention]).",
            setting="intervention",
        )
    return INTERVENTIONS[key]
