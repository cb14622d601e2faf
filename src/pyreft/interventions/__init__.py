"""The edits: small modules that map a hidden state h to h', and the table of their names."""

from ..errors import ReftError, did_you_mean
from .intervention import Intervention, stack
from .low_rank import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    LowRankIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .rank_one import Reftr1Intervention
from .rotation import LowRankRotateLayer, orthonormal_columns, orthonormalize
from .vectors import BiasIntervention, JolaIntervention, LofitIntervention, RedIntervention, RoadIntervention

__all__ = [
    "INTERVENTIONS",
    "BiasIntervention",
    "ConsreftIntervention",
    "DireftIntervention",
    "Intervention",
    "JolaIntervention",
    "LobireftIntervention",
    "LofitIntervention",
    "LoreftIntervention",
    "LowRankIntervention",
    "LowRankRotateLayer",
    "NodireftIntervention",
    "NoreftIntervention",
    "RedIntervention",
    "Reftr1Intervention",
    "RoadIntervention",
    "intervention_class",
    "orthonormal_columns",
    "orthonormalize",
    "register",
    "short_name",
    "stack",
]

INTERVENTIONS: dict[str, type[Intervention]] = {}
"""By its name in configs and files, every known class."""


def short_name(cls: type[Intervention]) -> str:
    """The name of a class in configs and files, such as `"loreft"`."""
    return cls.__name__.lower().removesuffix("intervention")


def register(cls: type[Intervention]) -> type[Intervention]:
    """Let configs and files name a class of one's own; a file alone can never bring in a class.

    Passing the class to `ReftConfig(intervention=...)` or `ReftModel.load(..., interventions=[...])` does the same.

    Raises:
        ReftError: not an intervention, or another class has the name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Intervention)):
        raise ReftError(
            f"expected a subclass of pyreft.interventions.Intervention, got {cls!r}.", setting="intervention"
        )
    name = short_name(cls)
    known = INTERVENTIONS.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ReftError(
            f"the name {name!r} of {cls!r} belongs to {known!r}; give the class another.", setting="intervention"
        )
    INTERVENTIONS[name] = cls  # the newer one, where a notebook defines a class again
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
):
    register(_cls)


def intervention_class(name: str | type[Intervention]) -> type[Intervention]:
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
