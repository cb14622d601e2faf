"""What a base model is made of, but for the numbers in its tensors, and whether it is still that.

Compared are, by identity, all attributes of its modules, their hooks, tensors and children, the members of their
classes, and what transformers has for them: the files of models, and the functions of attention that can be chosen. By
value, the containers among them are, configs included.
"""

import copy
import itertools
import operator
import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..tuner.layer import ReftLayer
from .origin import functions_of, module_of

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_TORCH = set(vars(nn.Module())) - {"training"}  # attributes that every module has
_NEUTRAL = {"warnings_issued", "name_or_path", "_name_or_path", "_commit_hash", "transformers_version", "use_cache"}
_NEUTRAL |= {"peft_config", "_output_capturing_hooks_installed"}  # what acts of it is in the modules
_NEUTRAL |= {"rope_deltas"}  # what one forward leaves to the generation behind it
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
_MODELS = "transformers.models."
_CONTAINERS = (dict, list, tuple, set, frozenset)


def outside_of_edits(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it, but for the interventions."""
    yield module
    for child in module.children():
        if not isinstance(child, ReftLayer):
            yield from outside_of_edits(child)


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks on a module."""
    for name in _HOOKS:
        yield from getattr(module, name).values()


def hooks_everywhere() -> Iterator[Any]:
    """The hooks that PyTorch calls for every module there is."""
    for name in _HOOKS:
        yield from getattr(torch.nn.modules.module, f"_global{name}", {}).values()


class Structure:
    """What a model is made of at the moment.

    Args:
        base: the model.

    Attributes:
        modules: those outside of the interventions.
        facts: a digest of all that has a value or a name; see `has_objects_of` for the rest.
    """

    def __init__(self, base: nn.Module) -> None:
        self.modules = list(dict.fromkeys(outside_of_edits(base)))
        self._attributes = [values for module in self.modules for values in (vars(module), module._modules)]
        self._attributes += [vars(config) for config in _configs_in(self._attributes)]
        classes = dict.fromkeys(type(module) for module in self.modules)
        owners = dict.fromkeys(owner for one in classes for owner in one.__mro__)
        own = [owner for owner in owners if owner not in PreTrainedModel.__mro__]
        files = dict.fromkeys(owner.__module__ for owner in own)
        code = [*map(vars, own), *(vars(sys.modules[name]) for name in files if name.startswith(_MODELS))]
        tensors = [kind for module in self.modules for kind in (module._parameters, module._buffers)]
        hooks = [getattr(module, name) for module in self.modules for name in _HOOKS]
        self._views = [[values.values() for values in group] for group in (self._attributes, code, tensors, hooks)]
        self._views[1] += [functions.values() for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
        self._parameters = [p for module in self.modules for p in module._parameters.values() if p is not None]
        self._then = self._now()
        self._containers = [(one, copy.copy(one)) for one in self._find_containers()]
        self._opaque: list[Any] = []
        self.facts = self._digest(classes)

    def is_same(self) -> bool:
        """Whether nothing has changed since."""
        now = self._now()
        # what is identical is equal; equal hooks that are methods need not be identical, tensors must be
        same = all(map(_equal, now, self._then)) and all(map(operator.is_, now[2], self._then[2]))
        return same and all(_equal(*pair) for pair in self._containers)

    def has_objects_of(self, other: "Structure") -> bool:
        """Whether functions and other objects without a value, and the code of the classes, are the same in both."""
        return _equal(self._opaque, other._opaque) and _equal(self._then[1], other._then[1])

    def _now(self) -> list[list]:
        """Attributes and children; what classes and files define; tensors; hooks; the classes, and what is trained."""
        found = [list(itertools.chain.from_iterable(group)) for group in self._views]
        found[3] += hooks_everywhere()
        return [*found, [*map(type, self.modules)], [parameter.requires_grad for parameter in self._parameters]]

    def _find_containers(self) -> Iterator[Any]:
        found: set[int] = set()
        named = [pair for values in self._attributes for pair in list(values.items())]
        waiting = [value for name, value in named if name not in _OF_TORCH]
        while waiting:
            value = waiting.pop()
            if isinstance(value, _CONTAINERS) and id(value) not in found:
                found.add(id(value))
                yield value
                waiting += value.values() if isinstance(value, dict) else value

    def _digest(self, classes: Iterable[type]) -> str:
        digest = xxhash.xxh3_128()
        described: dict[int, str] = {}
        for module in self.modules:
            children = [name for name, child in module._modules.items() if not isinstance(child, ReftLayer)]
            text = f"{_name(type(module))} {children} {self._describe_attributes(vars(module), described)}"
            digest.update(text.encode())
        for one in classes:
            for function in functions_of(cast(Any, one).forward):
                digest.update(f"{_name(function)} {module_of(function)}".encode())
                if (code := getattr(function, "__code__", None)) is not None:
                    digest.update(code.co_code)
        return digest.hexdigest()

    def _describe_attributes(self, attributes: dict[str, Any], configs: dict[int, str]) -> list[str]:
        names = sorted(attributes.keys() - _OF_TORCH - _NEUTRAL)
        return [f"{name} {self._describe(attributes[name], configs)}" for name in names]

    def _describe(self, value: Any, configs: dict[int, str]) -> str:
        """Its value, or its name and that it is opaque."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {self._describe(one, configs)}' for key, one in value.items())}}}"
        if isinstance(value, _CONTAINERS):
            parts = [self._describe(one, configs) for one in value]
            return f"[{', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)}]"
        if isinstance(value, PreTrainedConfig):
            if id(value) not in configs:
                configs[id(value)] = ""
                configs[id(value)] = f"{_name(type(value))} {self._describe_attributes(vars(value), configs)}"
            return configs[id(value)]
        if not isinstance(value, Tensor | nn.Module):  # the numbers of the one and what is in the other are seen to
            self._opaque.append(value)
        return _name(value)


def _configs_in(attributes: list[dict[str, Any]]) -> list[PreTrainedConfig]:
    """The configs among attributes, and those in these."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [value for values in attributes for value in list(values.values())]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PreTrainedConfig) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # tensors in it that are others
        return False
