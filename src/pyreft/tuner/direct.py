"""Who calls a module's `forward`, past its hooks, enters a call all the same.

`sentence-transformers` does, and programs that take a model's `forward` for the model. Where calls are entered, and
what they read, `hooks` knows.
"""

import types
from typing import Any, Protocol

from torch import nn

from .call import running

FORWARD, REPLICATE = "forward", "_replicate_for_data_parallel"


class Entrance(Protocol):
    """What a `Door` asks of `hooks.Entry`."""

    edits: Any

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]: ...

    def after(self, module: nn.Module, args: tuple, output: Any) -> None: ...


class Door:
    """The `forward` of a module at which calls are entered.

    Args:
        entry: of the module.
        module: it, or a copy of it by reference.
        own: the `forward` that the module had apart from its class; none if it had none.
    """

    def __init__(self, entry: Entrance, module: nn.Module, own: Any) -> None:
        self.entry, self.module, self.own = entry, module, own

    @property
    def __wrapped__(self) -> Any:  # what takes the same arguments, for who asks for the signature
        return types.MethodType(type(self.module).forward, self.module) if self.own is None else self.own

    @property
    def __code__(self) -> types.CodeType:  # where it is written, for `torch.export`
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # accelerate makes it a method, where it unwraps a model
            return Door(self.entry, args[0], self.own)(*args[1:], **kwargs)
        entry, module, announced = self.entry, self.module, running.announced
        if announced and announced[-1][0] is entry:  # by the hooks, of what may be a copy
            module = announced.pop()[1]
        elif not entry.edits.removed:
            output = None
            try:
                args, kwargs = entry.before(module, args, kwargs)
                output = self(*args, **kwargs)  # which `before` has announced
            finally:
                entry.after(module, args, output)
            return output
        return type(module).forward(module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)

    def replicate(self) -> nn.Module:
        """A replica of the module for `DataParallel`, whose own `forward` computes with the replica."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        vars(replica)[FORWARD] = Door(self.entry, replica, self.own)
        return replica


def open_door(entry: Entrance, module: nn.Module) -> None:
    """Let who calls the module's `forward` enter."""
    door = Door(entry, module, vars(module).get(FORWARD))
    vars(module).update({FORWARD: door, REPLICATE: door.replicate})


def close_door(edits: Any, module: nn.Module) -> None:
    """Give a module back the `forward` that it had."""
    door = vars(module).get(FORWARD)
    if isinstance(door, Door) and door.entry.edits is edits:
        del vars(module)[FORWARD]
        if door.own is not None:
            vars(module)[FORWARD] = door.own
    replicate = getattr(vars(module).get(REPLICATE), "__self__", None)
    if isinstance(replicate, Door) and replicate.entry.edits is edits:
        del vars(module)[REPLICATE]
