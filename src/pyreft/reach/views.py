"""A model in which some modules compute something else, for one forward and one thread.

A hook can stop a forward, and it can change what goes in and out; it cannot leave a module out. To give a module of the
model another `forward` would change it for every thread that calls it. So a view is made instead: shallow copies of the
modules on the way to those that compute something else, and of these themselves. All other modules, and every tensor
and hook, are the model's own, and the model does not change. Attributes that are bound to a copied module, such as a
`forward` that a user or accelerate has put there, are bound to its copy in the view.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..tuner.direct import Door

Forward = Callable[..., Any]
Copies = dict[int, nn.Module]  # by the `id` of a module


def view(model: nn.Module, forwards: Mapping[str, Forward]) -> Any:
    """Return a view of a model.

    Args:
        forwards: by the path of a module, what it computes there; its hooks stay.
    """
    copies: Copies = {}
    top, ends = _copied(model, copies), []
    for path in forwards:
        of, at = model, top
        for name in path.split("."):
            of = of._modules[name]  # type: ignore[assignment]
            copy = copies.get(id(of)) or _copied(of, copies)
            at._modules.update({other: copy for other, child in at._modules.items() if child is of})
            at = copy
        ends.append(at)
    for module in copies.values():
        for name, value in vars(module).items():
            if isinstance(value, types.MethodType | types.FunctionType | functools.partial | Door):
                vars(module)[name] = rebound(value, copies)
    for module, forward in zip(ends, forwards.values(), strict=True):
        vars(module)["forward"] = forward
    return top


def _copied(module: nn.Module, copies: Copies) -> nn.Module:
    made = copies[id(module)] = object.__new__(type(module))
    # a compiled call would compute the module itself
    vars(made).update(vars(module), _modules=dict(module._modules), _compiled_call_impl=None)
    return made


def rebound(value: Any, copies: Copies, inside: tuple = ()) -> Any:
    """The same callable, bound to the copies of modules instead of to them, and enclosing these.

    Args:
        inside: the functions that enclose it.
    """
    if id(value) in copies:
        return copies[id(value)]
    if any(value is function for function in inside):
        return value
    if isinstance(value, types.MethodType):
        function, owner = (rebound(part, copies, inside) for part in (value.__func__, value.__self__))
        return value if function is value.__func__ and owner is value.__self__ else types.MethodType(function, owner)
    if isinstance(value, functools.partial):
        function, *args = (rebound(part, copies, inside) for part in (value.func, *value.args))
        keywords = {name: rebound(part, copies, inside) for name, part in value.keywords.items()}
        return functools.partial(function, *args, **keywords)
    if isinstance(value, Door):
        module, own = (rebound(part, copies, inside) for part in (value.module, value.own))
        return value if module is value.module else Door(value.entry, module, own)
    if isinstance(value, types.FunctionType) and value.__closure__:
        return _enclosing(value, copies, inside)
    return value


def _enclosing(function: types.FunctionType, copies: Copies, inside: tuple) -> types.FunctionType:
    cells, changed, own = list(function.__closure__ or ()), False, []
    for number, cell in enumerate(cells):
        try:
            held = cell.cell_contents
        except ValueError:  # nothing in it yet
            continue
        if held is function:
            own.append(number)
        elif (bound := rebound(held, copies, (*inside, function))) is not held:
            cells[number], changed = types.CellType(bound), True
    if not changed:  # its cells are shared, for what it counts there
        return function
    for number in own:
        cells[number] = types.CellType()
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    for number in own:
        cells[number].cell_contents = made
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made).update(vars(function))
    return made
