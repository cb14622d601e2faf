"""The edits of one model: its adapters, with their rules and places, and the layers in which they act.

What is here lives as long as the model. What belongs to a call is in `Call`; `Edits.begin` makes one, with what is
active at that moment, so that a change of adapters or strengths applies to calls that begin later.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper

from ..errors import ReftError, did_you_mean
from ..places.structure import generates
from ..positions import Positions
from .call import STRENGTH, Call, Surroundings, running, within
from .changing import switching
from .deletion import delete_edits
from .located import Located
from .threads import Steps

_keys = itertools.count()

BASE = "__base__"  # the name of no adapter, as in PEFT


def check_strength(strength: Any) -> float:
    """Return a strength as a number.

    Raises:
        ReftError: it is none, or not finite.
    """
    try:
        number = float(strength)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ReftError(f"expected a finite number, got {strength!r}.", setting=STRENGTH)
    return number


class Edits:
    """The adapters of a model and its edited layers.

    Args:
        model: the adapted base model.
        stacks: the names of what computes tokens of its own, `"encoder"` and `"decoder"`; `""` if it is the model.
    """

    def __init__(self, model: Any, stacks: tuple[str, ...] = ("",)) -> None:
        self.model, self.stacks = model, stacks
        self.layers: list[Any] = []  # the ReftLayers
        self.rules: dict[str, list[Positions | None]] = {}  # of each adapter, by representation
        self.places: dict[str, list[str]] = {}  # of each adapter, by representation: the stack whose tokens pass there
        self.kinds: dict[str, Any] = {}  # of each adapter: equal for those whose edits can be stacked, none otherwise
        self.made: dict[str, dict[str, Any]] = {}  # of each adapter: what its config said of its edits
        self.told_of_labels = self.told_of_short = False  # that labels do not say where prompts end; see `short`
        self.told_of_unreached = self.told_of_cached = False
        self.strengths: dict[str, float] = {}  # of each adapter, 1 if it is not here
        self.causal = generates(model)
        self.removed = False
        self.gone: list[str] = []  # the names of adapters that were deleted
        self.wrapped = False  # whether a PEFT model holds the edits; if not, the model itself does
        self.steps = Steps()
        self.key = next(_keys)  # by which caches know this one's tokens

    # -- adapters -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> list[str]:
        """The adapters that edit in a call that would begin now, in the order in which they are summed."""
        return self.begin({}).active

    def check_names(self, names: Any, what: str, base: bool = True) -> None:
        """Refuse adapters that the model does not have; with `base`, the name of none is taken."""
        for name in names:
            if name not in self.rules and not (base and name == BASE):
                known = f"({', '.join(self.rules)}){f' or {BASE!r}' if base else ''}"
                raise ReftError(
                    f"expected adapters of this model {known}, got {name!r}.{did_you_mean(name, self.rules)}",
                    setting=what,
                )

    def check_given(self, given: dict[str, Any]) -> None:
        """Refuse a strength that is no finite number, or for an adapter that the model does not have."""
        strength = given.get(STRENGTH)
        if isinstance(strength, dict):
            self.check_names(strength, STRENGTH)
        for one in strength.values() if isinstance(strength, dict) else [] if strength is None else [strength]:
            check_strength(one)

    def forget(self, name: str, others: Iterable[str], heads: Sequence[AuxiliaryTrainingWrapper]) -> list[str]:
        """Let go of an adapter; return those that are active then (see `delete_edits`)."""
        self.gone.append(name)
        for known in (self.rules, self.places, self.kinds, self.made, self.strengths):
            known.pop(name, None)
        with switching:
            return delete_edits(name, others, self.layers, heads)

    # -- calls ----------------------------------------------------------------------------------------------------

    def begin(self, given: dict[str, Any]) -> Call:
        """Return a call that begins now, with the adapters that are active now, or that its surroundings name.

        Args:
            given: what it gives, by the names in `GIVEN`, and its `labels`.
        """
        around = [frame for frame in running.frames if frame.edits is self]
        row_adapters = around[-1].row_adapters if around and isinstance(around[-1], Surroundings) else None
        off = any(isinstance(frame, Surroundings) and frame.off for frame in around)
        with nullcontext() if torch.compiler.is_compiling() else switching:  # of one adapter in all layers
            enabled = self._enabled(off, row_adapters)
        call = Call(self, given, enabled, row_adapters, dict(self.strengths))
        call.gone, call.off = len(self.gone), off
        return call

    def _enabled(self, off: bool, row_adapters: list[str] | None) -> list[list[str]]:
        if off:
            return [[] for _ in self.layers]
        if row_adapters is None:
            return [layer.enabled_adapters for layer in self.layers]
        on = not any(layer.disable_adapters for layer in self.layers)
        names = [name for name in dict.fromkeys(row_adapters) if name != BASE] if on else []
        return [names for _ in self.layers]

    def labels_around(self) -> Any:
        """The labels that surround a call which is given none."""
        frames = (frame for frame in reversed(running.frames) if frame.edits is self)
        found = (frame.labels for frame in frames if isinstance(frame, Surroundings) and frame.labels is not None)
        return next(found, None)

    def check_running(self, call: Call) -> None:
        """Refuse to go on with a call whose adapters have been taken away since it began.

        Raises:
            ReftError: one of them was deleted, or all edits were taken off the model.
        """
        gone = [name for name in self.gone[call.gone :] if name in call.active]
        if gone or (self.removed and call.active):
            what = f"The adapter {gone[0]!r} was deleted" if gone else "The edits were taken off the model"
            raise ReftError(f"{what} while a call with it ran, which cannot be ended as it began. Wait for its end.")

    def tell_of_unreached(self, call: Call) -> None:
        """Warn, once, where a call has not called an edited module, as fused kernels that read weights do not."""
        if self.told_of_unreached or torch.compiler.is_compiling():
            return
        for layer in self.layers:
            if layer.number in call.reached:
                continue
            names = layer.indices if call.row_adapters is not None else call.enabled_at(layer.number)
            if any((name, index) in call.asked for name in names for index in layer.indices.get(name, ())):
                self.told_of_unreached = True
                if call.trains and _skips_blocks(self.model):  # at random, so it is another one in the next step
                    return
                module = layer.get_base_layer()
                paths = (path for path, one in self.model.named_modules() if one is module)
                path = next(paths, type(module).__name__)  # of one that was taken out of the model
                warnings.warn(
                    f"The model has not called {path!r}, so what is to be edited there was not"
                    f"{', and learns nothing' if call.trains else ''}. Some fused kernels read a module's weights "
                    "instead, and some models call its forward alone; edit another component then.",
                    stacklevel=2,
                )
                return

    @contextmanager
    def serving(self, located: Located, given: dict[str, Any] | None = None) -> Iterator[None]:
        """Edit the forwards in it at these locations, in the columns of cache and inputs."""
        call = self.begin(given or {})
        call.located, call.serving = located, True
        with within(call):
            yield


def _skips_blocks(model: Any) -> bool:
    """Whether a part of a model leaves out blocks at random in training, as `layerdrop` in its config asks for."""
    configs = [vars(module).get("config") for module in model.modules()]
    found = (item for config in configs if hasattr(config, "__dict__") for item in vars(config).items())
    return any(value for name, value in found if "layerdrop" in name)
