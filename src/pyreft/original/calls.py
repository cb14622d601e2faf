"""The original's way to call a model, translated: a dict of inputs first, `unit_locations`, and a pair in return."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ReftError
from ..positions import Positions
from ..tuner.call import GIVEN, LOCATIONS, SUBSPACES
from .locations import read_subspaces, read_unit_locations


def is_original(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is called in the manner of the original library."""
    return bool(args and isinstance(args[0], Mapping)) or "unit_locations" in kwargs or "base" in kwargs


def translate(args: tuple, kwargs: Mapping[str, Any], rules: Sequence[Positions | None]) -> dict[str, Any]:
    """Return the arguments of an original call as those of a transformers call.

    Args:
        args, kwargs: of the original call.
        rules: of the interventions, in their order; none for those whose tokens each call names.

    Raises:
        ReftError: arguments that ReFT has no use for, locations of another nesting or count, or none where the rules
            say nothing.
    """
    if len(args) > 1:
        raise ReftError("Only the inputs go by position; name the other arguments, as in unit_locations=... .")
    call = {**(args[0] if args else kwargs.get("base", {})), **kwargs}
    if not args:
        call.pop("base", None)
    if not call.pop("intervene_on_prompt", True):
        raise ReftError(
            "edits begin in the prompt; for tokens that are generated, too, use ReftConfig(positions='all').",
            setting="intervene_on_prompt",
        )
    if call.pop("sources", None) not in (None, [None]):
        raise ReftError("ReFT learns its edits and takes none from another input; pass no sources.", setting="sources")
    unit_locations, subspaces = call.pop("unit_locations", None), call.pop(SUBSPACES, None)
    rows = len(next(call[name] for name in ("input_ids", "inputs_embeds") if name in call))
    if subspaces is not None:
        call[SUBSPACES] = read_subspaces(subspaces, rows, len(rules))
    if unit_locations is not None:
        call[LOCATIONS] = read_unit_locations(unit_locations, rows, len(rules))
    elif None in rules and LOCATIONS not in call:
        raise ReftError(
            "this model's config has no position rule, so each call says which tokens to edit: "
            'unit_locations={"sources->base": (None, [interventions][batch][positions])}.',
            setting="unit_locations",
        )
    return call


def answer(run: Callable[..., Any], call: dict[str, Any], disabled: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the pair that the original returns: the base model's output if it was asked for, and the edited one.

    Args:
        run: what a transformers call calls.
        call: its arguments; see `translate`.
        disabled: makes a context in which the model is its base.
    """
    base = None
    if call.pop("output_original_output", False):
        with disabled():
            base = run(**{name: value for name, value in call.items() if name not in GIVEN})
    return base, run(**call)
