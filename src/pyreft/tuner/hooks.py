"""Where the forwards of a model enter and leave a call.

A forward is a call by itself, or a step of the generation that runs. At the module that reads the tokens of a stack,
the located tokens are found, and of these the ones that lie in what the forward computes.
"""

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import orthonormalize
from ..places.structure import text_model, without_adapters
from ..positions import IGNORED
from .caches import cache_of, counts, serves_requests
from .call import GIVEN, LENGTHS, LOCATIONS, STRENGTH, Call, Reading, innermost, running
from .continuous import Batches
from .direct import close_door, open_door
from .located import Located, times_of
from .packed import find_packed, tell_of_cache, tokens_of
from .recompute import bind, recomputes, unbind
from .registry import Edits
from .resolve import resolve

_GIVEN = frozenset(GIVEN)
_INSIDE = 10  # the depth of stacks, below any other entry


def attach(edits: Edits, batches: Batches, stacks: dict[str, nn.Module]) -> None:
    """Watch the calls of a model.

    Args:
        edits: of the model.
        batches: its continuous batching.
        stacks: by its name, the module that computes the tokens of an encoder or a decoder; none if the model does.
    """
    inner: Any = without_adapters(edits.model)
    backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "", None)
    # some trainers call the backbone directly, without the head; and some programs the language model, without images
    text = None if stacks else text_model(inner)
    modules = dict.fromkeys(entry for entry in (edits.model, inner, backbone, text) if isinstance(entry, nn.Module))
    for depth, module in enumerate(modules):
        Entry(edits, batches, depth, None if stacks else "", has_inner=depth + 1 < len(modules)).attach(module)
    for name, module in stacks.items():
        Entry(edits, batches, _INSIDE, name).attach(module)


def detach(edits: Edits) -> None:
    """Take every hook off a model."""
    for module in edits.model.modules():
        close_door(edits, module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if getattr(_owner(hook), "edits", None) is edits]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                module._forward_hooks_always_called.pop(number, None)
    unbind(edits.model)


def _owner(hook: Any) -> Any:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Entry) else None


class Entry:
    """One module whose forward a call may enter.

    Args:
        edits: of the model.
        batches: its continuous batching.
        depth: entries call those of a greater one.
        stack: whose tokens the module takes; those of `""` are read by the outermost entry that can.
        has_inner: whether one of them lies within.
    """

    def __init__(
        self, edits: Edits, batches: Batches, depth: int, stack: str | None, *, has_inner: bool = False
    ) -> None:
        self.edits, self.batches, self.depth, self.stack, self.has_inner = edits, batches, depth, stack, has_inner

    def attach(self, module: nn.Module) -> None:
        """Enter and leave at this module."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, always_call=True)
        open_door(self, module)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Enter a call: the one that runs, if this forward is a part of it, or a new one."""
        given = None if _GIVEN.isdisjoint(kwargs) else take_given(kwargs)
        named = kwargs if len(args) < 2 else _named(module, args, kwargs)
        frames = running.frames  # mostly the last that began is this model's, and each decoding step asks
        call = frames[-1] if frames and frames[-1].edits is self.edits else innermost(self.edits)
        if not isinstance(call, Call) or not self._is_part(call):
            call = self._begin(given or {}, named)
        elif given:
            call.given |= given
        outermost = not call.entered
        running.announced.append((self, module))
        call.entered.append(self.depth)  # from here on `after` leaves again, whatever happens
        if outermost:
            self._begin_forward(call, module)
        if self.stack is not None and (outermost or self.stack or call.readings.get("", call) is None):
            if call.active:
                self._read(call, self.stack, module, args, named)
            elif call.row_adapters is not None and call.located is None:
                self._check_rows(call, module, args, named)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Leave a call where it was entered."""
        frames, announced = running.frames, running.announced
        call = frames[-1] if frames and frames[-1].edits is self.edits else innermost(self.edits)
        if not isinstance(call, Call) or not call.entered or call.entered[-1] != self.depth:
            return
        call.entered.pop()
        if announced and announced[-1][0] is self:  # its forward did not begin, or another took its place
            announced.pop()
        if self.stack is not None and (reading := call.readings.get(self.stack)) is not None:
            self._remember(call, reading, output)
        if call.entered:
            call.left.append((self.depth, self.stack))
            return
        call.left.clear()
        if call.is_forward:
            del running.frames[call.height :]
            if call.trains:
                self.edits.steps.watch(output)
            if output is not None:  # as where it raised
                self.edits.check_running(call)
                self.edits.tell_of_unreached(call)
        elif call.readings:
            call.readings.clear()

    def _begin(self, given: dict[str, Any], named: dict[str, Any]) -> Call:
        """Begin a call that is this one forward, or the requests of continuous batching."""
        if (labels := named.get("labels")) is not None or (labels := self.edits.labels_around()) is not None:
            given["labels"] = labels
        call = self.batches.begin() if serves_requests(named) else self.edits.begin(given)
        call.height, call.is_forward = len(running.frames), True
        running.frames.append(call)
        return call

    def _is_part(self, call: Call) -> bool:
        """Whether a forward belongs to the call that runs: as a part of its forward, or as its next step."""
        if call.entered:  # a backbone that a hook asks once more is none
            return self.depth > call.entered[-1] and (self.depth, self.stack) not in call.left
        if call.serving:
            return True
        return call.generating and (call.prepared or not call.prepares)

    def _begin_forward(self, call: Call, module: nn.Module) -> None:
        if STRENGTH in call.given:
            self.edits.check_given(call.given)
        if call.generating:
            if self.edits.removed or len(self.edits.gone) > call.gone:
                self.edits.check_running(call)
            if self.stack != "encoder":
                call.prepared = False
        elif call.active and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            replica = getattr(module, "_is_replica", False)  # of DataParallel, whose gradients are added up on purpose
            call.trains = not replica and (self.edits.model.training or "labels" in call.given)
            if recomputes(self.edits.model):
                bind(self.edits, self.edits.model)

    def _read(self, call: Call, stack: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Find what is edited in this forward."""
        cache = cache_of(kwargs)
        if cache is not None and cache is call.behind and cache.get_seq_length() >= cast(Located, call.located).until:
            return
        call.readings.pop(stack, None)
        inputs, counted = _inputs(module, args, kwargs), cache is not None and counts(cache)
        # pictures or sound came in, or the choices of each row, of which the backbone will make rows
        if inputs is None or (self.has_inner and inputs.dim() == 3 + inputs.is_floating_point()):
            call.readings[stack] = None  # as yet only the states say how many tokens there are
            return
        past = 0 if cache is None else self._past(call, cache, counted)
        if stack == "encoder":  # another input, such as the next part of a recording
            call.started = None
        anew = call.generating and stack == "decoder" and cache is None  # each step reads the whole answer
        located = call.located or (call.started if anew else None) or self._locate(call, stack, past, inputs, kwargs)
        if anew:
            call.started = located
        end = past + inputs.shape[1]
        if call.generating and past >= located.until:  # an answer after the last located token: nothing to compute
            if cache is not None and not counted:
                cache.reft_past = Past(self.edits.key, None, end, [], None)
            elif cache is not None and call.located is not None and isinstance(cache.get_seq_length(), int):
                call.behind = cache
            return
        call.passed = end
        reading = call.read(stack, located, inputs.shape[0], inputs.shape[1], past)
        if reading.at.keys() - call.rotated and not torch.compiler.is_compiling():
            needed = [one for layer in self.edits.layers if layer.stack == stack for one in layer.rotations(reading)]
            call.rotations |= orthonormalize(needed, call.rotations)
            call.rotated |= reading.at.keys()

    def _check_rows(self, call: Call, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Refuse another number of names than rows where no row has an adapter, too."""
        if (inputs := _inputs(module, args, kwargs)) is not None:
            times_of(cast(list[str], call.row_adapters), len(inputs), call.generating and self.stack != "encoder")

    def _locate(self, call: Call, stack: str, past: int, inputs: Tensor, kwargs: dict) -> Located:
        if serves_requests(kwargs):
            return self.batches.locate(call, inputs, kwargs)
        known, rows, end = past_of(self.edits, cache_of(kwargs)), inputs.shape[0], past + inputs.shape[1]
        given = not call.generating and call.given.keys() & {LOCATIONS, LENGTHS}
        before = known.located if known and past and not given and known.holds(call, past) else None
        if before is not None and cast(Past, known).fits(call, rows):
            return before
        labels = call.given.get("labels")
        mask = tokens_of(kwargs.get("attention_mask"), inputs, rows, end)
        if before is not None and past >= before.length:  # other rows, behind the end of their prompts
            call.given[LENGTHS] = mask[:, : before.length].sum(1)
        takes_labels = self.edits.causal and stack != "encoder"
        if not (takes_labels and isinstance(labels, Tensor) and labels.shape == (rows, end)):
            labels = None  # none, or not those of a language model
        elif stack == "decoder":  # whose first input is the start token, and comes before the first label
            labels = nn.functional.pad(labels[:, :-1], (1, 0), value=IGNORED)
        ids = inputs if inputs.dim() == 2 and not past else None
        packed = None if past or call.generating else find_packed(inputs, kwargs)
        if packed is not None:
            tell_of_cache(kwargs, getattr(self.edits.model, "config", None))
        return resolve(self.edits, call, stack, mask, labels, ids, packed)

    def _past(self, call: Call, cache: Any, counted: bool) -> int:
        """How many tokens have passed before a forward, by its cache or by what is noted there."""
        if counted:
            length = cache.get_seq_length()
            # a static cache has the number on its device, where to ask for it would stop each step
            return call.passed if isinstance(length, Tensor) and call.generating and call.passed else int(length)
        if not cache.has_previous_state():  # a new one, or one that was reset
            return 0
        if (known := past_of(self.edits, cache)) is None:
            raise ReftError(
                "this recurrent state does not say how many tokens it has seen. Begin with a state that "
                "the adapted model has made itself, with its adapter active.",
                setting="cache_params",
            )
        return known.tokens

    def _remember(self, call: Call, reading: Reading, output: Any) -> None:
        """Leave what was found with the cache, for forwards that go on from it."""
        cache = cache_of(output)
        if cache is not None:
            located = None if call.located else reading.located
            cache.reft_past = Past(
                self.edits.key, located, reading.past + reading.tokens, call.active, call.row_adapters
            )


class Preparing:
    """The model's `prepare_inputs_for_generation`, which `generate` calls before each step, and nobody else does.

    So a step is told from a call that a logits processor, say, makes between two of them.
    """

    def __init__(self, edits: Edits) -> None:
        self.edits = edits

    @property
    def __signature__(self) -> inspect.Signature:  # `generate` reads there what the model takes
        signature = inspect.signature(type(self.edits.model).prepare_inputs_for_generation)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = running.frames[-1] if running.frames else None
        if isinstance(call, Call) and call.edits is self.edits:
            call.prepares = call.prepared = True
        model = self.edits.model
        return type(model).prepare_inputs_for_generation(model, *args, **kwargs)


class Past(NamedTuple):
    """What a cache knows of the tokens that it holds; copies of it do, too."""

    key: int  # of whose edits
    located: Located | None  # none after a generation: a new one has a prompt of its own
    tokens: int
    adapters: list[str]  # for which it was located
    rows: list[str] | None  # of them, that of each row, where each has its own

    def holds(self, call: Call, past: int) -> bool:
        """Whether a call edits what was located, behind so many tokens.

        Not so with further adapters, and where the end of the prompt was taken off the cache: what comes in its place
        is a prompt, too.
        """
        if self.located is None or not set(call.active) <= set(self.adapters):
            return False
        return past >= self.located.length or self.tokens < self.located.length

    def fits(self, call: Call, rows: int) -> bool:
        """Whether a forward of so many rows has the same, each of them once or more often."""
        if any(rows % len(mask) for mask in cast(Located, self.located).masks.values()):
            return False
        if call.row_adapters is None:
            return True
        times = len(call.row_adapters) // len(self.rows or call.row_adapters)
        return [name for name in self.rows or () for _ in range(times)] == call.row_adapters


def past_of(edits: Edits, cache: Any) -> Past | None:
    """What a cache knows for a model; none if another one filled it."""
    past = getattr(cache, "reft_past", None)
    return past if past is not None and past.key == edits.key else None


def take_given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take out of a call's arguments what the edits are given."""
    given = {name: kwargs.pop(name) for name in GIVEN if name in kwargs}
    return {name: value for name, value in given.items() if value is not None}


def _inputs(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """The token ids or embeddings of a call, none for a model that is given pictures or sound instead.

    States without tokens, `[batch, d]`, as a plain network takes them, are one token for each row: `[batch, 1, d]`.
    """
    value = kwargs.get("input_ids")
    if not isinstance(value, Tensor):
        first = args[0] if args and getattr(module, "main_input_name", "input_ids") == "input_ids" else None
        value = first if isinstance(first, Tensor) else kwargs.get("inputs_embeds")
    if not isinstance(value, Tensor):
        return None
    return value[:, None] if value.dim() == 2 and value.is_floating_point() else value


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by their names, those that were given by their places, too."""
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
