"""Which tokens are edited in the forward that runs now.

A `Locator` belongs to one model: it keeps the rules of the adapters and what the running call gives. A model computes
one `Stream` of tokens, or two if it has an encoder and a decoder; each turns these into the tokens to edit.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import ReftError, did_you_mean
from ..places.structure import without_adapters
from ..positions import Positions
from .continuous import Batches
from .deletion import delete_edits
from .located import Located
from .recompute import Recomputation
from .stream import GIVEN, LENGTHS, LOCATIONS, STRENGTH, SUBSPACES, Stream, unhook

__all__ = ["GIVEN", "LENGTHS", "LOCATIONS", "STRENGTH", "SUBSPACES", "Locator", "Stream"]

BASE = "__base__"  # the name of no adapter, as in PEFT


class Locator:
    """Resolves the locations before each forward of a model and serves them to its edited layers.

    Args:
        model: the adapted base model.
        stacks: by the name of each stream, the module that computes it, if it is not the model itself.
    """

    def __init__(self, model: Any, stacks: dict[str, nn.Module]) -> None:
        self.model: Any = model
        self.rules: dict[str, list[Positions | None]] = {}  # of each adapter, by representation
        self.places: dict[str, list[str]] = {}  # of each adapter, by representation: the stream's name
        self.kinds: dict[str, Any] = {}  # of each adapter: equal for those whose edits can be stacked, none otherwise
        self.strengths: dict[str, float] = {}  # of each adapter, 1 if it is not here
        self.row_adapters: list[str] | None = None  # while each row of a batch has its own
        self.call: dict[str, Any] = {}  # what the running call gave
        self.generating = self.removed = False
        self.wrapped = False  # whether a PEFT model holds the edits; if not, the model itself does
        self._recomputation = Recomputation(self, model)
        self.causal = hasattr(model, "can_generate") and model.can_generate()
        self._running: nn.Module | None = None
        inner: Any = without_adapters(model)
        backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "", None)
        # some trainers call the backbone directly, without the head
        entries = (entry for entry in (model, inner, backbone) if isinstance(entry, nn.Module))
        self._entries = list(dict.fromkeys(entries))
        for entry in self._entries:
            entry.register_forward_pre_hook(self._before, with_kwargs=True)
            entry.register_forward_hook(self._after, always_call=True)
        self.streams = {name: Stream(self, name, [module]) for name, module in stacks.items()}
        if not stacks:
            self.streams = {"": Stream(self, "", self._entries)}
        if hasattr(model, "generate"):
            self.model.generate = self.generate
        if hasattr(model, "delete_adapter"):
            self.model.delete_adapter = self.delete_adapter
        self.batches = Batches(model)
        if hasattr(model, "init_continuous_batching"):
            self.model.init_continuous_batching = self.batches.init_continuous_batching

    @property
    def layers(self) -> list[Any]:
        """The edited places of the model."""
        return [layer for stream in self.streams.values() for layer in stream.layers]

    @property
    def active(self) -> list[str]:
        """The adapters whose edits are switched on, in the order in which they are summed."""
        layers = self.layers
        if self.row_adapters is not None:
            on = not any(layer.disable_adapters for layer in layers)
            return [name for name in dict.fromkeys(self.row_adapters) if name != BASE] if on else []
        return list(dict.fromkeys(name for layer in layers for name in layer.enabled_adapters))

    def strength(self, name: str) -> float:
        """What an adapter's edits are multiplied by."""
        given = self.call.get(STRENGTH, 1.0)
        return self.strengths.get(name, 1.0) * float(given.get(name, 1.0) if isinstance(given, dict) else given)

    def check_names(self, names: Any, what: str, base: bool = True) -> None:
        """Refuse adapters that the model does not have; with `base`, the name of none is taken."""
        for name in names:
            if name not in self.rules and not (base and name == BASE):
                known = f"({', '.join(self.rules)}){f' or {BASE!r}' if base else ''}"
                raise ReftError(
                    f"{what}: expected adapters of this model {known}, got {name!r}.{did_you_mean(name, self.rules)}"
                )

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """`delete_adapter` of the model, which takes our layers for parameters and passes them over."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        configs = dict(getattr(self.model, "peft_config", {}))
        heads = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        if all(name in configs for name in names):  # else nothing is deleted
            for name in names:
                del configs[name]
                if name in self.rules:
                    self.forget(name, configs, heads)
        type(self.model).delete_adapter(self.model, adapter_names)

    def forget(self, name: str, others: Iterable[str], heads: Sequence[AuxiliaryTrainingWrapper]) -> list[str]:
        """Let go of an adapter; return those that are active then (see `delete_edits`)."""
        for known in (self.rules, self.places, self.kinds, self.strengths):
            known.pop(name, None)
        return delete_edits(name, others, self.layers, heads)

    def remove(self) -> None:
        """Take every hook off the model."""
        self.removed = True
        for stream in self.streams.values():
            stream.remove()
        for entry in self._entries:
            unhook(entry, self)
        for name in ("generate", "delete_adapter", "init_continuous_batching"):
            self.model.__dict__.pop(name, None)

    def recomputes(self) -> bool:
        """Whether the backward will compute the blocks, and so the edits inside them, once more."""
        return self._recomputation.will_be(self.model)

    def state(self) -> tuple:
        """What the edits of the forward that runs depend on."""
        return self.call, [stream.state() for stream in self.streams.values()]

    @contextmanager
    def recomputing(self, state: tuple, fresh: bool) -> Iterator[None]:
        """Serve what an earlier forward found, its `state`, to a part of it that is computed once more.

        Args:
            fresh: compute each R anew instead of taking the one of that forward, whose graph is of all layers.
        """
        with ExitStack() as before:
            before.callback(setattr, self, "call", self.call)
            self.call = state[0]
            for stream, of_stream in zip(self.streams.values(), state[1], strict=True):
                before.enter_context(stream.recomputing(of_stream, fresh))
            yield

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._running is not None:
            return None
        self._running = module
        given = {name: value for name in GIVEN if (value := kwargs.pop(name, None)) is not None}
        if not self.generating:
            self._take(given, kwargs.get("labels"))
            if self.active and self.recomputes() and not torch.compiler.is_compiling():
                self._recomputation.begin()
        return (args, kwargs)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is self._running:
            self._running = None
            self._recomputation.end()
            if not self.generating:
                self.call = {}

    def _take(self, given: dict[str, Any], labels: Any = None) -> None:
        if isinstance(given.get(STRENGTH), dict):
            self.check_names(given[STRENGTH], STRENGTH)
        self.call = given if labels is None else {**given, "labels": labels}

    def locate(self, tokens: Tensor, labels: Tensor | None, input_ids: Tensor, given: dict[str, Any]) -> Located:
        """Return what a call over whole rows would edit, without running it; see `Stream.resolve`.

        Args:
            given: what the call gives, by the names in `GIVEN`.
        """
        self._take(given)
        try:
            return self.streams[""].resolve(tokens, labels, input_ids)
        finally:
            self.call = {}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, with the locations resolved on the whole prompt before its first forward.

        Also takes `prompt_lengths`, `intervention_locations`, `subspaces` and `strength`. Right-padded prompts are
        aligned to the right first, since generation continues the last column: the result is that of the left-padded
        batch.
        """
        plain = functools.partial(type(self.model).generate, self.model)
        given = {name: value for name in GIVEN if (value := kwargs.pop(name, None)) is not None}
        if self.generating or not (self.active or self.row_adapters):
            return plain(*args, **kwargs)
        self._take(given)
        try:
            if list(self.streams) == [""]:
                args, kwargs, whole = self._whole_prompt(args, kwargs)
                self.streams[""].begin_generation(whole)
            self.generating = True
            return plain(*args, **kwargs)
        finally:
            self.generating, self._running, self.call = False, None, {}
            for stream in self.streams.values():
                stream.end_generation()

    def _whole_prompt(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, Located | None]:
        name = next((n for n in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
        if args:
            name, args, kwargs = "inputs", args[1:], {"inputs": args[0], **kwargs}
        if name is None:
            return args, kwargs, None
        mask, inputs = kwargs.get("attention_mask"), kwargs[name]
        tokens = inputs.new_ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        ids = inputs if inputs.dim() == 2 and inputs.shape == tokens.shape else None
        located = self.streams[""].resolve(tokens, None, ids)
        if mask is not None and kwargs.get("past_key_values") is None and not bool(tokens[:, -1].all()):
            order = tokens.long().argsort(dim=1, stable=True)
            for aligned in [key for key, value in kwargs.items() if key == name or _is_by_token(value, mask)]:
                kwargs[aligned] = _take(kwargs[aligned], order)
            located.masks = {key: _take(mask, order) for key, mask in located.masks.items()}
        return args, kwargs, located


def _take(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of `[batch, tokens, ...]`."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], order]


def _is_by_token(value: Any, mask: Tensor) -> bool:
    """Whether this is a mask, ids or types of the same tokens."""
    return isinstance(value, Tensor) and value.shape == mask.shape and not value.is_floating_point()
