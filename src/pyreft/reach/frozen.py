"""Whether a base model's parts give the same when they are computed apart, as far as its modules and config tell it.

Whether it is still what it was, `anatomy` and `tensors` tell; what only a comparison shows, `probe`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..sharded import is_sharded
from .anatomy import hooks_everywhere, hooks_of
from .origin import functions_of, module_of

_ROPE_BY_LENGTH = ("dynamic", "longrope")  # whose angles change where a row exceeds the original context
_CONTEXT = ("max_position_embeddings", "max_seq_len")  # how configs call the number of positions
# whose hooks edit, move between devices, or hand out what was computed to who asked for it
_KNOWN_HOOKS = ("pyreft.tuner.", "accelerate.", "transformers.utils.output_capturing")
_HARMLESS = "make_inputs_require_grads"  # transformers' and PEFT's, for checkpointing


def why_not_frozen(modules: Iterable[nn.Module], config: Any) -> str | None:
    """Why parts of a forward of these modules would differ when they are computed apart, if they would."""
    modules = list(modules)
    for module in modules:
        if any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None):
            return f"parameters of the base model are trained (in {type(module).__name__})"
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return "the base model has dropout in training; load it with a config in which it is 0"
        if any(is_sharded(parameter) for parameter in module._parameters.values()):
            return "the parameters of the base model are sharded"
        if any(parameter.is_meta for parameter in module._parameters.values() if parameter is not None):
            return "parameters of the base model are offloaded"
        if (hook := _foreign(hooks_of(module))) is not None:
            return f"a hook on {type(module).__name__} ({hook}) may look beyond the tokens that are computed"
    if (hook := _foreign(hooks_everywhere())) is not None:
        return f"a hook on all modules ({hook}) may look beyond the tokens that are computed"
    training = any(module.training for module in modules)
    for name, value in _numbers(config):
        if training and value > 0 and "drop" in name and not name.startswith(("classifier", "summary")):
            return f"the base model has dropout in training ({name} = {value}); load it with 0"
        if name == "output_router_logits" and value:
            return "the loss has a term for the routing of every token to its experts (output_router_logits)"
    return None


def why_not_entered(modules: Iterable[nn.Module]) -> str | None:
    """Why the inputs of the blocks may be others than those of a call, behind these modules around them."""
    for module in modules:
        if (hook := _foreign(module._forward_pre_hooks.values())) is not None:
            return f"a hook on {type(module).__name__} ({hook}) may change what the call gives"
    return None


def _foreign(hooks: Iterable[Any]) -> str | None:
    """The name of a hook that is not known to leave alone what is computed; none if there is none."""
    for hook in hooks:
        for function in functions_of(hook):
            name = getattr(function, "__name__", type(function).__name__)
            if name != _HARMLESS and not module_of(function).startswith(_KNOWN_HOOKS):
                return f"{module_of(function)}.{name}"
    return None


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """All numbers in a config, those of inner configs included."""
    entries = [config.to_dict()] if config is not None else []
    while entries:
        for name, value in entries.pop().items():
            if isinstance(value, dict):
                entries.append(value)
            elif isinstance(value, int | float):
                yield str(name), float(value)


def longest_plain_row(config: Any) -> int | None:
    """Up to how many tokens a position's angles are the same in every row; none for any number."""
    limits = []
    entries = [config.to_dict()] if config is not None else []
    while entries:
        entry = entries.pop()
        if entry.get("rope_type") in _ROPE_BY_LENGTH:
            known = entry.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
            limits.append(int(known))
        entries += [value for value in entry.values() if isinstance(value, dict)]
    return min(limits, default=None)


def context_of(config: Any) -> int:
    """How many positions a model has, as its config says; 0 where it does not say it."""
    known = (getattr(config, name, None) for name in _CONTEXT)
    return min((size for size in known if isinstance(size, int) and size > 0), default=0)
