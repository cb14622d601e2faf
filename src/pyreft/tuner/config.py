"""`ReftConfig`: what to edit, where, at which tokens and with what; a PEFT config, so plain data on disk."""

import copy
import enum
import inspect
import re
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from ..errors import ReftError, check_type, did_you_mean
from ..interventions import Intervention, intervention_class, register, setting_names, settings_of, short_name
from ..places.structure import PREFIX
from ..positions import Positions, rule_name


class ReftPeftType(str, enum.Enum):  # noqa: UP042 (PEFT reads the name behind the dot of a member's text)
    """The key under which PEFT finds this method; PEFT's own enum is closed."""

    REFT = "REFT"


@dataclass
class Representation:
    """One edited place: a component of one layer, the tokens, and the intervention.

    Args:
        component: a name such as `"block_output"`, or a module's path with `.input` or `.output`.
        layer: the number of the block; not needed for a path.
        head: the number of the attention head, for components that begin with `head_`.
        positions: the rule for the tokens, or a function (see `pyreft.positions.register_rule`); none if locations
            are given with each call.
        side: the `"prefix"` or the `"suffix"` of the rule alone.
        intervention: a name such as `"loreft"`, its class, or a ready module.
        low_rank_dimension, dropout, act_fn, add_bias: see `pyreft.interventions.LowRankIntervention`.
        intervention_kwargs: further arguments of the intervention's class, plain data.
    """

    component: str = "block_output"
    layer: int | None = None
    head: int | None = None
    positions: Any = None
    side: str | None = None
    intervention: Any = "loreft"
    low_rank_dimension: int | None = None
    dropout: float | None = None
    act_fn: str | None = None
    add_bias: bool | None = None
    intervention_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check(self, _SETTING_TYPES | {"component": (str,), "layer": (int, str), "head": (int,)})
        if isinstance(self.layer, str):
            (self.layer,) = _read_layers(self.layer)
        if self.side not in (None, "prefix", "suffix"):
            raise ReftError(f"expected prefix or suffix, got {self.side!r}.", setting="side")
        if isinstance(self.intervention, nn.Module):
            self._take_settings(self.intervention)
        else:
            self.intervention = short_name(intervention_class(self.intervention))
        if self.positions is not None:
            self.positions = rule_name(self.positions)

    def _take_settings(self, module: nn.Module) -> None:
        """A ready module decides its settings; a contradicting one beside it is an error."""
        register(type(module))
        settings = dict(settings_of(module))
        for name in _SETTINGS:
            value, given = settings.pop(name, None), getattr(self, name)
            if value is None and not isinstance(module, Intervention):
                continue  # what stands beside one in pyvene's shape goes to its class
            if name == "low_rank_dimension" and given not in (None, value):
                warnings.warn(
                    f"representations: low_rank_dimension is {given} beside an intervention made with {value}, "
                    "which is the one that counts.",
                    UserWarning,
                    stacklevel=2,
                )
            elif value is not None and given not in (None, value):
                raise ReftError(
                    f"{name} is {given} beside an intervention made with {value}; give it once, or twice the same.",
                    setting="representations",
                )
            setattr(self, name, value)
        self.intervention_kwargs = settings or None

    def rule(self) -> Positions | None:
        """The position rule as an object."""
        if self.positions is None:
            return None
        rule = Positions.parse(self.positions)
        return next((part for part in rule.sides() if part.side == self.side), rule)

    def make(self, width: int) -> Any:
        """Return the intervention for states of this width, ready or newly made."""
        if isinstance(self.intervention, nn.Module):
            known = getattr(self.intervention, "embed_dim", None)
            if known is not None and int(known) != width:
                raise ReftError(
                    f"the {self.component} of layer {self.layer} is {width} wide, "
                    f"the intervention given for it {int(known)}.",
                    setting="embed_dim",
                )
            return self.intervention
        cls = intervention_class(self.intervention)
        settings = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name)}
        if self.low_rank_dimension is not None:  # 0 is refused, not left out
            settings["low_rank_dimension"] = self.low_rank_dimension
        settings |= self.intervention_kwargs or {}
        taken, others = setting_names(cls)
        for name in settings:
            if name not in taken and not others:
                raise ReftError(
                    f"the intervention {self.intervention!r} does not take it, only "
                    f"{', '.join(sorted(taken))}.{did_you_mean(name, taken)}",
                    setting=name,
                )
        if "low_rank_dimension" in taken and self.low_rank_dimension is None:
            raise ReftError(
                f"no rank was given for the {self.component} of layer {self.layer}.", setting="low_rank_dimension"
            )
        _check_numbers(cls, settings)
        try:
            return cls(embed_dim=width, **settings)
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, ReftError):
                raise
            raise ReftError(
                f"no {cls.__name__} can be made with {settings} ({error!r}).", setting="intervention"
            ) from error

    def settle(self) -> None:
        """Let go of a ready module, which now belongs to a model, and remember its class by name."""
        if isinstance(self.intervention, nn.Module):
            self.intervention = short_name(type(self.intervention))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a module is named by its class."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.intervention, nn.Module):
            data["intervention"] = short_name(type(self.intervention))
        return {key: value for key, value in data.items() if value is not None}


DEFAULT_POSITIONS = "l16"  # by `benchmarks/study.py`; the paper's is f7+l7
_SETTINGS = ("low_rank_dimension", "dropout", "act_fn", "add_bias")
_SETTING_TYPES: dict[str, tuple[type, ...]] = {
    "low_rank_dimension": (int,),
    "dropout": (float,),
    "act_fn": (str,),
    "add_bias": (bool,),
    "intervention_kwargs": (dict,),
}
_TYPES: dict[str, tuple[type, ...]] = _SETTING_TYPES | {
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version"), (str,)),
    **dict.fromkeys(("component", "prompt_format"), (str,)),
    **dict.fromkeys(("inference_mode", "share_weights"), (bool,)),
    **dict.fromkeys(("auto_mapping", "base_model_shape"), (dict,)),
    **dict.fromkeys(("modules_to_save", "representations"), (list, tuple, dict)),
}
DEFAULT_RANK = 8
# fields of a config that each of its representations has for itself
_SAID_BY_EACH = ("layers", "component", "positions", "intervention", "share_weights", "intervention_kwargs", *_SETTINGS)
_MOST = 10**6  # layers or dimensions; nothing is made for a file that says more
# keys of the original's representations that say what is always so here
_IMPLIED = ("unit", "max_number_of_units", "intervention_type")


@dataclass
class ReftConfig(PeftConfig):
    """Configuration of representation finetuning, for `pyreft.get_reft_model` and for every PEFT entry point.

    Either the few fields below describe edits that are the same in all chosen layers, or `representations` lists
    them one by one, in the manner of the original library.

    Args:
        representations: a dict or a list of dicts with the fields of `Representation`, instead of `layers`; what an
            entry does not say, the fields below say for it. An entry without positions, here and there, edits at
            the locations that come with each call.
        layers: `"all"`, a number, a list of numbers, or text such as `"3;9;18"`.
        component: which states of a layer.
        positions: `f<n>`, `l<n>`, `f<n>+l<m>`, `prompt` or `all`, or a function (see
            `pyreft.positions.register_rule`); `l16` if nothing is said here and there are no representations.
        intervention: a name in `pyreft.interventions.INTERVENTIONS` such as `"loreft"`, or a class.
        low_rank_dimension: the rank of the edits, 8 if not given; for interventions that have one.
        share_weights: one intervention for prefix and suffix of `f<n>+l<m>` instead of one each.
        dropout, act_fn, add_bias: see `pyreft.interventions.LowRankIntervention`.
        intervention_kwargs: further arguments of the intervention's class, plain data.
        modules_to_save: further modules to train and save, such as a classifier's head.
        prompt_format: how prompts were written in training from files, for those who ask the adapter later.
        base_model_shape: type and sizes of the base model, filled in; an adapter fits no other.
        model_type: accepted for the original's callers.
        intervention_types: a class for all representations that name none, or a list with one for each.

    Raises:
        ReftError: an unknown rule, intervention or key of a representation, or a rank that is no whole number.

    Example:
        >>> ReftConfig(layers="all", positions="l1", low_rank_dimension=4).positions
        'l1'
    """

    target_modules: ClassVar[None] = None  # PEFT's injection asks for it; our places come from the fields below

    representations: Any = field(default=None, metadata={"help": "Edited places one by one, as dicts."})
    layers: Any = field(default="all", metadata={"help": "'all', a number, a list, or text such as '3;9;18'."})
    component: str = field(default="block_output", metadata={"help": "Which states of a layer."})
    positions: Any = field(default=None, metadata={"help": "Which tokens: f<n>, l<n>, f<n>+l<m>, prompt, all."})
    intervention: Any = field(default="loreft", metadata={"help": "Which formula."})
    low_rank_dimension: int | None = field(default=None, metadata={"help": "The rank of the edits, 8 if not given."})
    share_weights: bool = field(default=True, metadata={"help": "One intervention for prefix and suffix."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edit, in training."})
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

    def __post_init__(self, model_type: Any, intervention_types: Any) -> None:
        _check(self, _TYPES)
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ReftError(f"expected one of {', '.join(TaskType)}, got {self.task_type!r}.", setting="task_type")
        super().__post_init__()
        self.peft_type = ReftPeftType.REFT
        self.layers = _read_layers(self.layers)
        cls = intervention_class(
            type(self.intervention) if isinstance(self.intervention, nn.Module) else self.intervention
        )
        if self.low_rank_dimension is None and _takes_rank(cls):
            self.low_rank_dimension = DEFAULT_RANK
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
            self.representations = [self._read(*each) for each in zip(given, types, strict=True)]
        elif self.positions is None:
            self.positions = DEFAULT_POSITIONS
        self.intervention = short_name(cls)
        self.positions = None if self.positions is None else rule_name(self.positions)

    def _read(self, entry: Any, kind: Any) -> Representation:
        """One of the representations, in any form that the original takes; `kind` is its class, if it names none."""
        if isinstance(entry, Representation):
            return entry
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
        inherited = ["positions", "component", "intervention"]
        if not isinstance(given, nn.Module):
            taken, _ = setting_names(intervention_class(given))
            inherited += [name for name in _SETTINGS if name in taken]
            if "intervention" not in values:
                inherited.append("intervention_kwargs")
        return Representation(**{name: getattr(self, name) for name in inherited} | values)

    def expand(self, number_of_layers: int | None) -> list[Representation]:
        """The edited places one by one, for a model of so many layers.

        The order is that of the interventions in every call and file. A prefix and a suffix with weights of their
        own come as in the original: first all prefixes, then all suffixes.
        """
        if self.representations is not None:
            return self.representations
        layers = range(number_of_layers or 0) if self.layers == "all" else self.layers
        rule = Positions.parse(self.positions or DEFAULT_POSITIONS)
        sides = [None] if self.share_weights else [part.side for part in rule.sides()]
        return [
            Representation(
                component=self.component,
                layer=layer,
                positions=self.positions,
                side=side,
                intervention=self.intervention,
                **{name: getattr(self, name) for name in (*_SETTINGS, "intervention_kwargs")},
            )
            for side in sides
            for layer in layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without modules; beside `representations`, which say it all, nothing else that says the same."""
        listed = self.representations is not None
        names = [f.name for f in fields(self) if not (listed and f.name in _SAID_BY_EACH)]
        data = {name: copy.deepcopy(getattr(self, name)) for name in names if name != "representations"}
        entries = [entry.to_dict() for entry in self.representations] if listed else None
        return data | {"peft_type": ReftPeftType.REFT.value, "representations": entries}


def _check(given: Any, types: dict[str, tuple[type, ...]]) -> None:
    """Refuse fields of a config with values that they cannot have: those of a file may be anything."""
    for name, kinds in types.items():
        value = getattr(given, name)
        if value is not None or name == "component":
            check_type(name, value, *kinds)
        if isinstance(value, dict) or name == "modules_to_save":
            for key in value or ():
                check_type(name, key, str)
    if given.dropout is not None and not 0 <= given.dropout <= 1:
        raise ReftError(f"expected a share from 0 to 1, got {given.dropout!r}.", setting="dropout")
    shape = getattr(given, "base_model_shape", None) or {}
    for name in ("hidden_size", "num_hidden_layers"):
        number = shape.get(name)  # none, of a network without blocks
        if number is not None and (type(number) is not int or not 1 <= number <= _MOST):
            raise ReftError(
                f"{name}: expected a number from 1 to {_MOST:,}, got {number!r}.", setting="base_model_shape"
            )


def _takes_rank(cls: type[Any]) -> bool:
    names, others = setting_names(cls)
    return others or "low_rank_dimension" in names


def _check_numbers(cls: type[Intervention], settings: dict[str, Any]) -> None:
    """Refuse anything else for an argument of a class that is a number by default, or true or false."""
    for owner in cls.__mro__:
        arguments = inspect.signature(vars(owner)["__init__"]).parameters if "__init__" in vars(owner) else {}
        for name, argument in arguments.items():
            if name in settings and isinstance(argument.default, (bool, int, float)):
                check_type(name, settings[name], bool if isinstance(argument.default, bool) else float)


def _read_layers(given: Any) -> Any:
    layers = given
    if isinstance(layers, str):
        if layers.strip().lower() == "all":
            return "all"
        parts = [part for part in re.split(r"[;,\s]+", layers.strip()) if part]
        layers = [int(part) if re.fullmatch(r"\d{1,9}", part) else part for part in parts]
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, Sequence) or not layers or not all(type(layer) is int for layer in layers):
        raise ReftError(
            f"expected 'all', a number, a list, or text such as '3;9;18', got {reprlib.repr(given)}.", setting="layers"
        )
    if len(set(layers)) < len(layers):
        raise ReftError(f"a layer stands twice in {reprlib.repr(list(layers))}.", setting="layers")
    return list(layers)


def shape_differences(expected: dict[str, Any] | None, found: dict[str, Any] | None) -> str:
    """What differs between two `base_model_shape`s, in words; an empty text if nothing does."""
    expected, found = expected or {}, found or {}
    return ", ".join(
        f"{name} {found.get(name)!r} instead of {expected.get(name)!r}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    )


def register_with_peft(tuner: type) -> None:
    """Make PEFT know this method: its four mappings are plain dicts and take a key of our own."""
    PEFT_TYPE_TO_CONFIG_MAPPING[ReftPeftType.REFT] = ReftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ReftPeftType.REFT] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[ReftPeftType.REFT] = PREFIX
