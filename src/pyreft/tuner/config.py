"""`ReftConfig`: what to edit, where, at which tokens and with what; a PEFT config, so plain data on disk."""

import copy
import enum
import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from ..errors import ReftError, check_type, did_you_mean
from ..interventions import intervention_class, setting_names, short_name
from ..places.components import is_path
from ..places.structure import PREFIX
from ..positions import Positions, rule_name
from .from_peft import read_lora
from .representation import (
    SETTING_TYPES,
    SETTINGS,
    Representation,
    beginning,
    check_fields,
    default_component,
    default_dropout,
    default_intervention,
    default_rank,
    layer_of_path,
    read_components,
    read_layers,
)


class ReftPeftType(str, enum.Enum):  # noqa: UP042 (PEFT reads the name behind the dot of a member's text)
    """The key under which PEFT finds this method; PEFT's own enum is closed."""

    REFT = "REFT"


DEFAULT_POSITIONS = "l16"  # by `benchmarks/study.py`; the paper's is f7+l7
_TYPES: dict[str, tuple[type, ...]] = SETTING_TYPES | {
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version"), (str,)),
    "prompt_format": (str,),
    "component": (str, list, tuple),
    **dict.fromkeys(("inference_mode", "share_weights"), (bool,)),
    **dict.fromkeys(("auto_mapping", "base_model_shape"), (dict,)),
    **dict.fromkeys(("modules_to_save", "representations"), (list, tuple, dict)),
}
# fields of a config that each of its representations has for itself
_SAID_BY_EACH = ("layers", "component", "positions", "intervention", "share_weights", "intervention_kwargs", *SETTINGS)
# what PEFT's other methods call something that has another name here
_OTHER_NAMES = {
    "target_modules": "component, or representations for modules by their paths",
    "exclude_modules": "layers and component, which name what is edited and nothing else",
    "r": "low_rank_dimension",
    "lora_alpha": 'intervention_kwargs={"alpha": ...} beside intervention="lora"',
    "lora_dropout": "dropout",
}
# keys of the original's representations that say what is always so here
_IMPLIED = ("unit", "max_number_of_units", "intervention_type")


@dataclass
class ReftConfig(PeftConfig):
    """Configuration of representation finetuning, for `pyreft.get_reft_model` and for every PEFT entry point.

    Either the few fields below describe edits that are the same in all chosen layers, or `representations` lists
    them one by one, in the manner of the original library. If nothing is said of the edit itself, no formula,
    component or rank, it is LoRA of rank 1 on each layer's value and output projections, at the located tokens alone,
    trained with dropout: on the tasks of `benchmarks/study.py` it learns much more than LoReFT with half of the
    parameters.

    Args:
        representations: a dict or a list of dicts with the fields of `Representation`, instead of `layers`; what an
            entry does not say, the fields below say for it. An entry without positions, here and there, edits at
            the locations that come with each call.
        layers: `"all"`, a number, a list of numbers, or text such as `"3;9;18"`.
        component: which states of a layer, or the path of one module, as `"model.layers[3].mlp.output"`; a list of
            several edits each of them, with parameters of its own. If
            nothing is said, `value_output` and `attention_output` for `"lora"`, `block_output` for other formulas.
        positions: `f<n>`, `l<n>`, `f<n>+l<m>`, `prompt` or `all`, or a function (see
            `pyreft.positions.register_rule`). If nothing is said here and there are no representations, it is filled
            in by the model: `l16` for one that generates, `all` for others, such as classifiers and encoders, which
            may read any token.
        intervention: a name in `pyreft.interventions.INTERVENTIONS` such as `"loreft"`, or a class. If nothing is
            said, `"lora"`; beside a component, representations or a rank, which are in the original's manner,
            `"loreft"`.
        low_rank_dimension: the rank of the edits, for interventions that have one; if not given, 1 for `"lora"`, 8
            for others.
        share_weights: one intervention for prefix and suffix of `f<n>+l<m>` instead of one each.
        dropout: on the edit, in training alone; 0.3 if nothing is said of the edit, else 0.
        act_fn, add_bias: see `pyreft.interventions.LowRankIntervention`.
        intervention_kwargs: further arguments of the intervention's class, plain data.
        modules_to_save: further modules to train and save, such as a classifier's head.
        prompt_format: how prompts were written in training from files, for those who ask the adapter later.
        base_model_shape: type and sizes of the base model, filled in; an adapter fits no other.
        model_type: accepted for the original's callers.
        intervention_types: a class for all representations that name none, or a list with one for each; without
            representations, name the `intervention`.
        layers_to_transform: `layers`, as PEFT calls it.
        init_weights: begin at h' = h (true), as PEFT calls `intervention_kwargs={"init": "identity"}`, or not.

    Raises:
        ReftError: an unknown rule, intervention or key of a representation, or a rank that is no whole number.

    Example:
        >>> ReftConfig(layers="all", positions="l1", low_rank_dimension=4).positions
        'l1'
    """

    target_modules: ClassVar[None] = None  # PEFT's injection asks for it; our places come from the fields below

    representations: Any = field(default=None, metadata={"help": "Edited places one by one, as dicts."})
    layers: Any = field(default="all", metadata={"help": "'all', a number, a list, or text such as '3;9;18'."})
    component: Any = field(default=None, metadata={"help": "Which states of a layer, one name or several."})
    positions: Any = field(default=None, metadata={"help": "Which tokens: f<n>, l<n>, f<n>+l<m>, prompt, all."})
    intervention: Any = field(
        default=None, metadata={"help": "Which formula: lora, or loreft beside a component or a rank."}
    )
    low_rank_dimension: int | None = field(default=None, metadata={"help": "The rank of the edits."})
    share_weights: bool = field(default=True, metadata={"help": "One intervention for prefix and suffix."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout on the edit, in training."})
    act_fn: str | None = field(default=None, metadata={"help": "Activation of the learned source."})
    add_bias: bool = field(default=False, metadata={"help": "A bias for the second projection of NoReFT and DiReFT."})
    intervention_kwargs: dict | None = field(default=None, metadata={"help": "Further arguments of the intervention."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    prompt_format: str | None = field(
        default=None, metadata={"help": "How prompts were written in training from files: text, chat or alpaca."}
    )
    base_model_shape: dict | None = field(
        default=None, metadata={"help": "Type and sizes of the model that the adapter was made for; filled in."}
    )
    model_type: InitVar[Any] = None
    intervention_types: InitVar[Any] = None
    layers_to_transform: InitVar[Any] = None
    init_weights: InitVar[bool | None] = None

    def __post_init__(
        self, model_type: Any, intervention_types: Any, layers_to_transform: Any, init_weights: bool | None
    ) -> None:
        if layers_to_transform is not None:
            if self.layers not in ("all", layers_to_transform):
                raise ReftError(
                    f"layers are {self.layers!r} and layers_to_transform {layers_to_transform!r}; give one of them.",
                    setting="layers",
                )
            self.layers = layers_to_transform
        check_fields(self, _TYPES)
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ReftError(  # in the words of PEFT
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: "
                f"{', '.join(TaskType)}.",
                setting="task_type",
            )
        super().__post_init__()
        self.peft_type = ReftPeftType.REFT
        self.layers = read_layers(self.layers)
        if self.component is not None:
            self.component = _one_or_several(read_components(self.component))
        own = self.component, self.representations, self.low_rank_dimension
        if self.dropout is None:
            self.dropout = default_dropout(self.intervention, *own)
        if self.intervention is None:
            self.intervention = default_intervention(*own)
        given = self.intervention
        cls = intervention_class(type(given) if isinstance(given, nn.Module) else given)
        if self.representations is not None:
            if self.layers != "all":
                raise ReftError(
                    "each of the representations names its own layer; give one or the other.", setting="layers"
                )
            given = [self.representations] if isinstance(self.representations, dict) else list(self.representations)
            if not given:
                raise ReftError("expected at least one edited place, got an empty list.", setting="representations")
            types = intervention_types if isinstance(intervention_types, list) else [intervention_types] * len(given)
            if len(types) != len(given):
                raise ReftError(
                    f"expected {len(given)}, one for each entry, got {len(types)}.", setting="intervention_types"
                )
            each = zip(given, types, strict=True)
            self.representations = [place for entry, kind in each for place in self._read(entry, kind)]
            if init_weights is not None:
                for place in self.representations:
                    place.begin(init_weights)
            self.component = self.component or "block_output"  # which says nothing any more
        elif intervention_types is not None:
            raise ReftError("it is for representations, of which there are none; give intervention.",
                            setting="intervention_types")  # fmt: skip
        else:
            self.low_rank_dimension = self._rank_of(cls)
            self.component = self.component or default_component(cls)
            if init_weights is not None:
                self.intervention_kwargs = beginning(cls, self.intervention_kwargs, init_weights)
        self.intervention = short_name(cls)
        self.positions = None if self.positions is None else rule_name(self.positions)

    def _read(self, entry: Any, kind: Any) -> list[Representation]:
        """One of the representations, in any form that the original takes, as one for each of its components.

        Args:
            kind: its class, if it names none.
        """
        if isinstance(entry, Representation):
            return [entry]
        if hasattr(entry, "_asdict"):  # pyvene's RepresentationConfig
            entry = {key: value for key, value in entry._asdict().items() if value is not None}
        check_type("representations", entry, dict)
        kind = entry.get("intervention_type") or kind
        if kind is not None and entry.get("intervention") is None:
            entry = {**entry, "intervention": kind}
        known = [f.name for f in fields(Representation)]
        for key in entry:
            if key not in known and key not in _IMPLIED:
                raise ReftError(
                    f"expected the keys {', '.join(known)}, got {key!r}.{did_you_mean(key, known)}",
                    setting="representations",
                )
        values = {key: value for key, value in entry.items() if key in known}
        unit = entry.get("unit", "pos")
        if isinstance(unit, int):
            values.setdefault("head", unit)
        elif unit not in ("pos", "h", "h.pos"):
            raise ReftError(
                f"expected the unit 'pos', or the number of a head, got {unit!r}.", setting="representations"
            )
        given = values.get("intervention", self.intervention)
        component = values.pop("component", None)
        component = self.component if component is None else component
        components = read_components(default_component(given) if component is None else component)
        if len(components) == 1 and layer_of_path(components[0], values.get("layer")) is not None:
            warnings.warn(  # as in the original, whose callers count layers in other ways
                f"representations: layer is {values.pop('layer')} beside the path {components[0]!r}, which is what "
                "counts.",
                UserWarning,
                stacklevel=2,
            )
        inherited = ["positions", "intervention"]
        if not isinstance(given, nn.Module):
            taken, _ = setting_names(intervention_class(given))
            inherited += [name for name in SETTINGS if name in taken]
            if "intervention" not in values:
                inherited.append("intervention_kwargs")
        values = {name: getattr(self, name) for name in inherited} | values
        if "low_rank_dimension" in inherited and values["low_rank_dimension"] is None:
            values["low_rank_dimension"] = self._rank_of(intervention_class(given))
        return [Representation(component=component, **values) for component in components]

    def _rank_of(self, cls: type[Any]) -> int | None:
        """The rank of an intervention's class, where it has one."""
        names, others = setting_names(cls)
        takes = others or "low_rank_dimension" in names
        return default_rank(cls) if self.low_rank_dimension is None and takes else self.low_rank_dimension

    def expand(self, number_of_layers: int | None, positions: str = DEFAULT_POSITIONS) -> list[Representation]:
        """The edited places one by one, for a model of so many layers; `positions` are those of a config without.

        The order is that of the interventions in every call and file: by layer, of a layer by component; modules that
        are given by their paths come first, once each, unless their layers are named. A prefix and a suffix with
        weights of their own come as in the original: first all prefixes, then all suffixes.
        """
        if self.representations is not None:
            return self.representations
        positions = self.positions or positions
        names = read_components(self.component)
        if self.layers == "all":  # a path names its own
            places: list[tuple[int | None, str]] = [(None, name) for name in names if is_path(name)]
            places += [(n, name) for n in range(number_of_layers or 0) for name in names if not is_path(name)]
        else:
            places = [(layer, name) for layer in self.layers for name in names]
        sides = [None] if self.share_weights else [part.side for part in Positions.parse(positions).sides()]
        return [
            Representation(
                component=component,
                layer=layer,
                positions=positions,
                side=side,
                intervention=self.intervention,
                **{name: getattr(self, name) for name in (*SETTINGS, "intervention_kwargs")},
            )
            for side in sides
            for layer, component in places
        ]

    @classmethod
    def from_lora(cls, path: str | os.PathLike, positions: Any = None) -> "ReftConfig":
        """Return a config of the edits that a LoRA of PEFT makes, with its weights, at some tokens alone.

        `get_reft_model(model, config)` is then the model with these edits. A LoRA that was trained at every token
        is the same with `positions="all"`; at other tokens it does what its training meant only if that was on these.

        Args:
            path: an adapter's directory, or its name on the hub.
            positions: the rule for the tokens; not needed if `ReftModel.save_lora` wrote the adapter.

        Raises:
            ReftError: not a LoRA, one of linear layers alone that this formula is not, or no positions.
        """
        lora = read_lora(path)
        positions = lora.positions if positions is None else positions
        if positions is None:
            raise ReftError(
                f"{path}: expected a rule for the tokens that the LoRA was trained on, such as 'prompt' or 'l16', or "
                "'all', got none.",
                setting="positions",
            )
        places = [{"component": f"{path}.output", "intervention": module} for path, module in lora.edits.items()]
        return cls(
            representations=places,
            positions=positions,
            task_type=lora.task_type,
            base_model_name_or_path=lora.base_model,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without modules; beside `representations`, which say it all, nothing else that says the same."""
        listed = self.representations is not None
        names = [f.name for f in fields(self) if not (listed and f.name in _SAID_BY_EACH)]
        data = {name: copy.deepcopy(getattr(self, name)) for name in names if name != "representations"}
        entries = [entry.to_dict() for entry in self.representations] if listed else None
        return data | {"peft_type": ReftPeftType.REFT.value, "representations": entries}

    def edits(self) -> dict[str, Any]:
        """What the config says of its edits, as plain data: what a model reads once, when they are made."""
        return {name: value for name, value in self.to_dict().items() if name in (*_SAID_BY_EACH, "representations")}


def _refusing_other_names(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def __init__(self: ReftConfig, *args: Any, **kwargs: Any) -> None:
        for name, ours in _OTHER_NAMES.items():
            if name in kwargs:
                raise ReftError(f"ReFT calls it otherwise: give {ours}.", setting=name)
        make(self, *args, **kwargs)

    return __init__


ReftConfig.__init__ = _refusing_other_names(ReftConfig.__init__)  # type: ignore[method-assign]


def _one_or_several(names: list[str]) -> str | list[str]:
    return names if len(names) > 1 else names[0]


def shape_differences(expected: dict[str, Any] | None, found: dict[str, Any] | None) -> str:
    """What differs between two `base_model_shape`s, in words; an empty text if nothing does."""
    expected, found = expected or {}, found or {}
    return ", ".join(
        f"{name} {found.get(name)!r} instead of {expected.get(name)!r}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    )


def check_unchanged(adapter_name: str, made: dict[str, Any], says: dict[str, Any]) -> None:
    """Refuse to hand out an adapter whose config was changed since its edits were made, which a change does not reach.

    Args:
        adapter_name: the adapter's.
        made: what the config said then, see `ReftConfig.edits`.
        says: what it says now.

    Raises:
        ReftError: another value of a field; with it, the files would be those of other edits.
    """
    for name, value in made.items():
        if says.get(name) != value:
            raise ReftError(
                f"the edits of {adapter_name!r} were made with {value!r}, and its config was then changed to "
                f"{says.get(name)!r}, which changes nothing in the model. Set it back, or give the new value to a "
                "config of its own: model.add_adapter(name, config).",
                setting=name,
            )


def register_with_peft(tuner: type) -> None:
    """Make PEFT know this method: its mappings are plain dicts and take a key of our own."""
    PEFT_TYPE_TO_CONFIG_MAPPING[ReftPeftType.REFT] = ReftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ReftPeftType.REFT] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[ReftPeftType.REFT] = PREFIX
