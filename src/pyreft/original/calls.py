"""The original's way to call a model, translated: a dict of inputs first, `unit_locations`, and a pair in return."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from ..data.supervised import plain
from ..errors import ReftError
from ..positions import Positions
from ..tuner.call import GIVEN, LOCATIONS, SUBSPACES
from .locations import read_subspaces, read_unit_locations

# the arguments in their order; `generate` takes those of transformers' beside them
FORWARD = (
    *("base", "sources", "unit_locations", "source_representations", "subspaces", "labels"),
    *("output_original_output", "return_dict", "use_cache", "intervention_additional_kwargs"),
)
GENERATE = (
    *("base", "sources", "unit_locations", "source_representations", "intervene_on_prompt", "subspaces"),
    *("output_original_output", "intervention_additional_kwargs"),
)


@dataclass
class IntervenableModelOutput(ModelOutput):
    """What an original call with `return_dict=True` returns instead of the pair."""

    original_outputs: Any = None
    intervened_outputs: Any = None
    collected_activations: Any = None


def is_original(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is called in the manner of the original library."""
    return bool(args and isinstance(args[0], Mapping)) or "unit_locations" in kwargs or "base" in kwargs


def check_tokens(given: Any) -> Tensor:
    """Return what is given, if it is a tensor, and no text and no list of tokens.

    Raises:
        TypeError: saying how to make one.
    """
    if not isinstance(given, Tensor):
        raise TypeError(
            "expected the tokens of the inputs as a tensor, such as **tokenizer(texts, padding=True, "
            f"return_tensors='pt'), got {'none' if given is None else type(given).__name__}."
        )
    return given


def by_names_too(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a `forward` in the original's manner, of a user's subclass, be called by names, too, as trainers do.

    It gets what the original's trainer gave it, and the edited output of the pair that it returns is returned.
    """

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or "base" in kwargs or "input_ids" not in kwargs:
            return forward(self, *args, **kwargs)
        call = {name: kwargs.pop(name) for name in ("labels", SUBSPACES) if kwargs.get(name) is not None}
        if SUBSPACES in call:
            call[SUBSPACES] = [list(rows) for rows in zip(*plain(call[SUBSPACES]), strict=True)]
        located = plain(kwargs.pop(LOCATIONS, "all"))
        if located != "all":
            call["unit_locations"] = {"sources->base": (None, [list(rows) for rows in zip(*located, strict=True)])}
        found = forward(self, base=kwargs, **call)
        return found[1] if isinstance(found, tuple) and len(found) == 2 else found

    return wrapped


def translate(
    args: tuple, kwargs: Mapping[str, Any], order: Sequence[str], rules: Sequence[Positions | None]
) -> dict[str, Any]:
    """Return the arguments of an original call as those of a transformers call; see also `answer`.

    Where it names no tokens, the interventions without a rule edit all of them.

    Args:
        args, kwargs: of the original call.
        order: `FORWARD` or `GENERATE`.
        rules: of the interventions, in their order; none for those whose tokens each call names.

    Raises:
        ReftError: arguments that ReFT has no use for, or locations of another nesting or count.
        TypeError: inputs that are no tensors.
    """
    if len(args) > len(order):
        raise ReftError(f"Expected at most {len(order)} arguments by position ({', '.join(order)}), got {len(args)}.")
    given = dict(zip(order, args, strict=False))
    if twice := given.keys() & kwargs.keys():
        raise ReftError("given by position and by name.", setting=min(twice))
    call = {**given, **kwargs}
    base = call.pop("base", None)
    if not isinstance(base, Mapping | None):
        raise ReftError(
            f"expected the inputs by their names, such as tokenizer(..., return_tensors='pt'), got a "
            f"{type(base).__name__}.",
            setting="base",
        )
    call = {**(base or {}), **call}
    generates = order is GENERATE
    unit_locations, subspaces = call.pop("unit_locations", None), call.pop(SUBSPACES, None)
    everywhere = unit_locations is None and LOCATIONS not in call and None in rules
    on_prompt = call.pop("intervene_on_prompt", None)
    if generates and everywhere and not on_prompt:
        raise ReftError(
            "this model's config has no position rule, so each call says which tokens to edit: "
            'unit_locations={"sources->base": (None, [interventions][batch][positions])}; or that all are, those that '
            "are generated, too: intervene_on_prompt=True without unit_locations.",
            setting="unit_locations",
        )
    if on_prompt is False:
        raise ReftError(
            "edits begin in the prompt; for tokens that are generated, too, use ReftConfig(positions='all').",
            setting="intervene_on_prompt",
        )
    if call.pop("sources", None) not in (None, [None]) or call.pop("source_representations", None) is not None:
        raise ReftError("ReFT learns its edits and takes none from another input; pass no sources.", setting="sources")
    if call.pop("intervention_additional_kwargs", None):
        setting = "intervention_additional_kwargs"
        raise ReftError("the interventions of this model take no further arguments.", setting=setting)
    inputs = next((call[name] for name in ("input_ids", "inputs_embeds") if name in call), None)
    rows, tokens = check_tokens(inputs).shape[:2]
    if subspaces is not None and (chosen := read_subspaces(subspaces, rows, len(rules), repeated=generates)):
        call[SUBSPACES] = chosen
    if unit_locations is not None:
        call[LOCATIONS] = read_unit_locations(unit_locations, rows, len(rules), tokens, repeated=generates)
    elif everywhere:
        call[LOCATIONS] = "all"  # a rule for those that have none
    return call


def answer(run: Callable[..., Any], call: dict[str, Any], disabled: Callable[[], Any]) -> Any:
    """Return what the original returns: the base model's output if it was asked for, and the edited one.

    Args:
        run: what a transformers call calls.
        call: its arguments; see `translate`.
        disabled: makes a context in which the model is its base.
    """
    base, named = None, call.pop("return_dict", False)
    if call.pop("output_original_output", False):
        with disabled():
            base = run(**{name: value for name, value in call.items() if name not in GIVEN})
    edited = run(**call)
    return IntervenableModelOutput(original_outputs=base, intervened_outputs=edited) if named else (base, edited)
