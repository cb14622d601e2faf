"""One edited place of a config: where, at which tokens and with what; plain data, or a ready module."""

import inspect
import re
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ..errors import ReftError, check_type, did_you_mean
from ..interventions import Intervention, intervention_class, register, setting_names, settings_of, short_name
from ..positions import Positions, rule_name

SETTINGS = ("low_rank_dimension", "dropout", "act_fn", "add_bias")
SETTING_TYPES: dict[str, tuple[type, ...]] = {
    "low_rank_dimension": (int,),
    "dropout": (float,),
    "act_fn": (str,),
    "add_bias": (bool,),
    "intervention_kwargs": (dict,),
}
_MOST = {"hidden_size": 10**6, "num_hidden_layers": 10**4}  # nothing is made for a file that says more


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
        check_fields(self, SETTING_TYPES | {"component": (str,), "layer": (int, str), "head": (int,)})
        if isinstance(self.layer, str):
            layers = read_layers(self.layer)
            if layers == "all" or len(layers) > 1:
                raise ReftError(
                    f"expected the number of one layer, got {self.layer!r}; write a representation for each layer, or "
                    "`layers` in place of `representations`.",
                    setting="layer",
                    also=["layers", "representations"],
                )
            (self.layer,) = layers
        if (other := layer_of_path(self.component, self.layer)) is not None:
            raise ReftError(
                f"expected that of the path {self.component!r}, got {self.layer}; give {other}, or the path alone "
                "in `representations`.",
                setting="layer",
                also=["representations"],
            )
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
        for name in SETTINGS:
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

    @property
    def reads_input(self) -> bool:
        """Whether the intervention reads what the linear layer read whose output it edits."""
        given = self.intervention
        return getattr(given if isinstance(given, nn.Module) else intervention_class(given), "reads_input", False)

    def make(self, width: int, input_width: int | None = None) -> Any:
        """Return the intervention, ready or newly made.

        Args:
            width: of the states to edit.
            input_width: of what it reads beside them, see `reads_input`.
        """
        widths = {"embed_dim": width} | ({"input_dim": input_width} if self.reads_input else {})
        if isinstance(self.intervention, nn.Module):
            for name, needed in widths.items():
                known = getattr(self.intervention, name, None)
                if known is not None and int(known) != needed:
                    what = "the input of " * (name == "input_dim")
                    raise ReftError(
                        f"{what}the {self.component} of layer {self.layer} is {needed} wide, "
                        f"the intervention given for it {int(known)}.",
                        setting=name,
                    )
            return self.intervention
        cls = intervention_class(self.intervention)
        settings = {name: getattr(self, name) for name in SETTINGS if getattr(self, name)}
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
            return cls(**widths, **settings)
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, ReftError):
                raise
            raise ReftError(
                f"no {cls.__name__} can be made with {settings} ({error!r}).", setting="intervention"
            ) from error

    def begin(self, identity: bool) -> None:
        """Begin training at h' = h, or not; see `beginning`."""
        if isinstance(self.intervention, nn.Module):
            raise ReftError(
                f"a ready {type(self.intervention).__name__} begins as it was made; "
                "make it with init='identity', which is h' = h.",
                setting="init_weights",
            )
        cls = intervention_class(self.intervention)
        self.intervention_kwargs = beginning(cls, self.intervention_kwargs, identity)

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


def beginning(cls: type[Any], arguments: dict[str, Any] | None, identity: bool) -> dict[str, Any] | None:
    """The arguments of an intervention that begins at h' = h, or of one that does not.

    Raises:
        ReftError: a class that always begins at h' = h is to begin elsewhere.
    """
    check_type("init_weights", identity, bool)
    if not vars(cls).get("begins_at_identity", False):  # a class that takes no `init` says so when it is made
        return {**(arguments or {}), "init": "identity"} if identity else arguments
    if not identity:
        raise ReftError(f"{cls.__name__} always begins at h' = h; leave it out.", setting="init_weights")
    return arguments


def read_components(given: Any) -> list[str]:
    """The components that a config names: one, several, or text such as `"value_output,attention_output"`.

    Raises:
        ReftError: none, one that stands twice, or those of an encoder beside those of a decoder.
    """
    check_type("component", given, str, list, tuple)
    names = given.split(",") if isinstance(given, str) else list(given)
    names = [name.strip() if isinstance(name, str) else name for name in names]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ReftError(
            f"expected a name, a list of names, or text such as 'value_output,attention_output', got {given!r}.",
            setting="component",
        )
    if len(set(names)) < len(names):
        raise ReftError(f"a component stands twice in {', '.join(names)}.", setting="component")
    if len({name.startswith("decoder.") for name in names}) > 1:
        raise ReftError(
            f"an encoder and a decoder have layers of their own, got {', '.join(names)}; give `representations`.",
            setting="component",
        )
    return names


def default_intervention(*beside: Any) -> str:
    """The formula if none is named: LoReFT, as in the original, beside what is its own; else what learns best."""
    return "lora" if all(one is None for one in beside) else "loreft"


def default_dropout(*named: Any) -> float:
    """The dropout on an edit if nothing is said: what learns best where nothing of the edit is named, else none."""
    return 0.3 if all(one is None for one in named) else 0.0


def default_rank(cls: type[Any]) -> int:
    """The rank of an intervention's class if none is given."""
    return 1 if getattr(cls, "reads_input", False) else 8


def default_component(kind: Any) -> str | list[str]:
    """Where an intervention edits, a class, its name or a ready one, if nothing is said."""
    known = kind if isinstance(kind, nn.Module) else intervention_class(kind)
    return ["value_output", "attention_output"] if getattr(known, "reads_input", False) else "block_output"


def layer_of_path(component: str, layer: Any) -> str | None:
    """The layer that a component names by its path, if another one is given beside it."""
    numbers = re.findall(r"(?<=[.\[])\d+(?=[.\]])", component)
    return numbers[0] if layer is not None and numbers and str(layer) not in numbers else None


def check_fields(given: Any, types: dict[str, tuple[type, ...]]) -> None:
    """Refuse fields of a config with values that they cannot have: those of a file may be anything."""
    for name, kinds in types.items():
        value = getattr(given, name)
        if value is not None or (name == "component" and isinstance(given, Representation)):
            check_type(name, value, *kinds)
        if isinstance(value, dict) or name == "modules_to_save":
            for key in value or ():
                check_type(name, key, str)
    if given.dropout is not None and not 0 <= given.dropout <= 1:
        raise ReftError(f"expected a share from 0 to 1, got {given.dropout!r}.", setting="dropout")
    shape = getattr(given, "base_model_shape", None) or {}
    for name, most in _MOST.items():
        number = shape.get(name)  # none, of a network without blocks
        if number is not None and (type(number) is not int or not 1 <= number <= most):
            raise ReftError(
                f"{name}: expected a number from 1 to {most:,}, got {number!r}.", setting="base_model_shape"
            )


def _check_numbers(cls: type[Intervention], settings: dict[str, Any]) -> None:
    """Refuse anything else for an argument of a class that is a number by default, or true or false."""
    for owner in cls.__mro__:
        arguments = inspect.signature(vars(owner)["__init__"]).parameters if "__init__" in vars(owner) else {}
        for name, argument in arguments.items():
            if name in settings and isinstance(argument.default, (bool, int, float)):
                check_type(name, settings[name], bool if isinstance(argument.default, bool) else float)


def read_layers(given: Any) -> Any:
    """The layers that a config names, as a list, or `"all"`."""
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
