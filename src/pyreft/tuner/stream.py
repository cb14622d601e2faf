"""One sequence of tokens that a model computes, and which of them are edited in the forward that runs now.

A `Stream` turns the position rules, or locations given with a call, into masks of absolute token indices once, where a
sequence begins, and hands each later forward the part that falls into the window of tokens it computes. So one-shot
and chunked prefill, a reused prefix, decoding, beams and padding are one mechanism. The formulas and the places in the
network are not known here.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ReftError
from ..interventions import Intervention, LowRankRotateLayer, orthonormalize
from ..positions import Positions, prompt_tokens
from .located import Key, Located, Window, group_rows, mask_of, subspace_masks
from .packed import Packed, find_packed

if TYPE_CHECKING:
    from .locator import Locator

# what a call may give, beside what the model itself takes
LOCATIONS, LENGTHS, SUBSPACES, STRENGTH = "intervention_locations", "prompt_lengths", "subspaces", "strength"
GIVEN = (LOCATIONS, LENGTHS, SUBSPACES, STRENGTH)
CACHES = ("past_key_values", "cache_params")


class Stream:
    """One sequence of tokens that a model computes, and what is edited in it now.

    Args:
        locator: of the model.
        name: `"encoder"`, `"decoder"`, or empty for a model with one sequence.
        entries: the modules whose `forward` takes the tokens; the first may call the others.
    """

    def __init__(self, locator: "Locator", name: str, entries: list[nn.Module]) -> None:
        self.locator = locator
        self.name = name
        self.layers: list[Any] = []  # the ReftLayers that edit this sequence
        self.rows = self.tokens = 0
        self._end = 0  # how many tokens will have passed after this forward; 0 where nobody counts them
        self.located: Located | None = None
        self._windows: dict[Key, Window] | None = {}
        self._whole: Located | None = None  # while generating: resolved on the whole prompt
        self._generated = False
        self._known: weakref.WeakKeyDictionary[Any, Located] = weakref.WeakKeyDictionary()
        self._passed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # tokens in recurrent states
        self._running: nn.Module | None = None  # the entry whose forward runs
        self.hooked = True  # whether the layers have their hooks
        self._rotations: list[LowRankRotateLayer] = []
        self.stacks: dict[Any, Intervention] = {}  # those that rows with adapters of their own share; of one call
        self._entries = entries
        for entry in entries:
            entry.register_forward_pre_hook(self._before, with_kwargs=True)
            entry.register_forward_hook(self._after, always_call=True)

    def __getstate__(self) -> dict:  # a copy of the model starts with nothing in flight
        return {
            **self.__dict__,
            "_known": None,
            "_passed": None,
            "located": None,
            "_windows": {},
            "_rotations": [],
            "stacks": {},
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _known=weakref.WeakKeyDictionary(), _passed=weakref.WeakKeyDictionary())

    def windows(self, h: Tensor) -> dict[Key, Window]:
        """What to edit in the states `[batch, tokens, d]` of the forward that runs."""
        if self._windows is None:  # pictures or sound came in: only the states say how many tokens they are
            located = self.resolve(torch.ones(h.shape[:2], dtype=torch.bool, device=h.device))
            self._open(located, 0, *h.shape[:2])
        assert self._windows is not None
        return self._windows

    # -- around a forward -----------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._running is not None:
            return  # the backbone, called by the model
        self._running = module
        inputs, cache = _inputs(module, args, kwargs), _cache(kwargs)
        if self._generated and inputs is not None and cache is not None:
            self._windows = {}  # decoding after the last located token: nothing to compute
            self._hook(False)
            self._end += inputs.shape[1]
            return
        self._end = 0
        if not self.locator.active:
            return
        if inputs is None:
            self.located = self._windows = None
            self._hook(True)
            return
        past = self._past_length(cache)
        self._end = past + inputs.shape[1]
        self._open(self._whole or self._locate(past, inputs, kwargs), past, *inputs.shape[:2])
        self._generated = self._whole is not None and self._whole.done(past + self.tokens)
        self._hook(bool(self._windows))
        if self._windows and not self.stacks and not torch.compiler.is_compiling():
            self._rotations = [rotation for layer in self.layers for rotation in layer.rotations(self._windows)]
            orthonormalize(self._rotations)

    def _open(self, located: Located, past: int, rows: int, tokens: int) -> None:
        self.located, self.rows, self.tokens = located, rows, tokens
        self._windows = located.windows(past, tokens, rows)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not self._running:
            return
        self._running = None
        cache = _cache(output) if hasattr(output, "get") else None
        if cache is not None and self._end and not _counts(cache):
            self._passed[cache] = self._end
        if self._whole is not None:
            if self._generated:
                self._windows = {}
                self._hook(False)
            return
        if cache is not None and self.located is not None:
            self._known[cache] = self.located
        self.forget()

    def _past_length(self, cache: Any) -> int:
        if cache is None:
            return 0
        if _counts(cache):
            return int(cache.get_seq_length())
        if cache not in self._passed and cache.has_previous_state():
            raise ReftError(
                "cache_params: this recurrent state does not say how many tokens it has seen. Begin with a state that "
                "the adapted model has made itself, with its adapter active."
            )
        return self._passed.get(cache, 0)

    def forget(self) -> None:
        """Leave nothing of a forward behind."""
        for rotation in self._rotations:
            rotation.forget_graph()
        self._rotations, self._windows, self.located, self.stacks = [], {}, None, {}
        self._hook(True)

    def state(self) -> tuple:
        """What the edits of the forward that runs depend on; see `Locator.state`."""
        kept = [(rotation, rotation.kept) for rotation in self._rotations]
        return self.located, self.rows, self.tokens, self._windows, kept

    @contextmanager
    def recomputing(self, state: tuple, fresh: bool) -> Iterator[None]:
        """Serve what an earlier forward found; see `Locator.recomputing`."""
        before = self.located, self.rows, self.tokens, self._windows
        *found, then = state
        now = [(rotation, rotation.kept) for rotation, _ in then]
        self.located, self.rows, self.tokens, self._windows = found
        for rotation, kept in then:
            rotation.kept = None if fresh else kept
        try:
            yield
        finally:
            self.located, self.rows, self.tokens, self._windows = before
            for rotation, kept in now:
                rotation.kept = kept

    def _hook(self, wanted: bool) -> None:
        if wanted is not self.hooked and not torch.compiler.is_compiling():
            for layer in self.layers:
                layer.set_hooked(wanted)
            self.hooked = wanted

    def remove(self) -> None:
        """Take every hook off the model."""
        self._hook(False)
        for entry in self._entries:
            unhook(entry, self)

    # -- generation -----------------------------------------------------------------------------------------------

    def begin_generation(self, whole: Located | None) -> None:
        """Serve the locations of the whole prompt, if they are known, to all forwards until `end_generation`."""
        self._whole, self._generated = whole, False

    def end_generation(self) -> None:
        """Also after a generation that was interrupted."""
        self._whole, self._generated, self._running = None, False, None
        self.forget()

    @contextmanager
    def serving(self, located: Located) -> Iterator[None]:
        """Serve these locations, in the columns of cache and inputs, to a forward."""
        self.begin_generation(located)
        try:
            yield
        finally:
            self.end_generation()

    # -- from rules to masks --------------------------------------------------------------------------------------

    def _locate(self, past: int, inputs: Tensor, kwargs: dict) -> Located:
        if kwargs.get("cache") is not None and "read_index" in kwargs:
            return self.locator.batches.locate(self, inputs, kwargs)
        call, cache = self.locator.call, _cache(kwargs)
        if past and cache in self._known and (self.locator.generating or not call.keys() & {LOCATIONS, LENGTHS}):
            return self._known[cache]
        rows, end = inputs.shape[0], past + inputs.shape[1]
        mask, labels = kwargs.get("attention_mask"), call.get("labels")
        if not (isinstance(mask, Tensor) and mask.shape == (rows, end)):
            mask = inputs.new_ones((rows, end), dtype=torch.bool)
        takes_labels = self.locator.causal and self.name != "encoder"
        if not (takes_labels and isinstance(labels, Tensor) and labels.shape == (rows, end)):
            labels = None  # none, or not those of a language model
        elif self.name == "decoder":  # whose first input is the start token, and comes before the first label
            labels = nn.functional.pad(labels[:, :-1], (1, 0), value=-100)
        ids = inputs if inputs.dim() == 2 and not past else None
        packed = None if past or self.locator.generating else find_packed(inputs, kwargs)
        return self.resolve(mask.bool(), labels, ids, packed)

    def resolve(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        packed: Packed | None = None,
    ) -> Located:
        """Return the located tokens of the active adapters, by what the call gave.

        Args:
            tokens: `[batch, tokens]`, false for padding.
            labels: `[batch, tokens]`, -100 where there is no loss; the prompt ends before the first label.
            input_ids: `[batch, tokens]`, where they are known.
            packed: the examples of the rows, if they have several; rules hold for each of them.
        """
        locator = self.locator
        beams = self.name == "decoder" and locator.generating
        kinds = {name: locator.kinds[name] for name in locator.active}
        located = Located(group_rows(locator.row_adapters, kinds, tokens, beams))
        keys = [(name, index) for name in located.groups or kinds for index in self._indices(name)]
        given = locator.call.get(LOCATIONS)
        if given is not None and not isinstance(given, str):
            self._resolve_given(located, keys, tokens, given)
        else:
            self._resolve_rules(located, keys, tokens, labels, input_ids, packed)
        if SUBSPACES in locator.call:
            ranks = {key: layer.rank(key) for layer in self.layers for key in keys if layer.has(key)}
            counts = {name: len(locator.rules[name]) for name in locator.active}
            located.subspaces = subspace_masks(locator.call[SUBSPACES], ranks, counts, tokens)
        return located

    def rules(self) -> list[Positions | None]:
        """The rules of the active adapters here."""
        return [self.locator.rules[name][index] for name in self.locator.active for index in self._indices(name)]

    def _indices(self, name: str) -> list[int]:
        return [index for index, place in enumerate(self.locator.places[name]) if place == self.name]

    def _resolve_rules(
        self,
        located: Located,
        keys: list[Key],
        tokens: Tensor,
        labels: Tensor | None,
        input_ids: Tensor | None,
        packed: Packed | None,
    ) -> None:
        if packed is not None:
            tokens = packed.apart(tokens, False)
            labels = None if labels is None else packed.labels_apart(labels)
            input_ids = None if input_ids is None else packed.apart(input_ids, 0)
        lengths = self.locator.call.get(LENGTHS) if self.name != "decoder" else None
        if lengths is not None:
            lengths = _lengths(lengths, tokens)
            missing = max(int((lengths - tokens.sum(-1)).max()), 0)
            tokens = nn.functional.pad(tokens, (0, missing), value=True)
            input_ids = input_ids if input_ids is None or not missing else nn.functional.pad(input_ids, (0, missing))
        prompt = prompt_tokens(tokens, labels, lengths)
        made: dict[Positions, Tensor] = {}
        given = self.locator.call.get(LOCATIONS)  # a rule for those that have none
        otherwise = None if given is None else Positions.parse(given)
        for name, index in keys:
            rule = self.locator.rules[name][index] or otherwise
            if rule is None:
                continue
            if rule not in made:  # an answer is covered by `all` from the beginning
                mask = tokens if rule.whole == "all" else rule.locate(prompt, input_ids)
                made[rule] = mask if packed is None else packed.together(mask)
            located.add((name, index), made[rule], endless=rule.whole == "all")

    def _resolve_given(self, located: Located, keys: list[Key], tokens: Tensor, locations: Any) -> None:
        at = torch.as_tensor(locations, device=tokens.device)
        if at.dim() != 3 or at.shape[0] != len(tokens) or at.is_floating_point():
            raise ReftError(
                f"{LOCATIONS}: expected whole numbers of the shape [batch, interventions, positions] for a batch of "
                f"{len(tokens)}, got {list(at.shape)}{' of ' + str(at.dtype) if at.is_floating_point() else ''}."
            )
        for name in self.locator.active:
            if at.shape[1] != len(self.locator.rules[name]):
                raise ReftError(
                    f"{LOCATIONS}: the adapter {name!r} has {len(self.locator.rules[name])} interventions, "
                    f"locations came for {at.shape[1]} (shape [batch, interventions, positions] = {list(at.shape)})."
                )
        at = at[:, [index for _, index in keys]]
        if at.numel() and (int(at.max()) >= tokens.shape[1] or int(at.min()) < -1):
            raise ReftError(
                f"{LOCATIONS}: expected indices from 0 to {tokens.shape[1] - 1} in rows of {tokens.shape[1]} tokens "
                f"(-1 for none), got {int(at.min())} to {int(at.max())}."
            )
        same = mask_of(at[:, 0], tokens.shape[1]) if at.shape[1] and bool((at == at[:, :1]).all()) else None
        for column, key in enumerate(keys):
            located.add(key, mask_of(at[:, column], tokens.shape[1]) if same is None else same)


def unhook(module: nn.Module, owner: object) -> None:
    """Take the hooks that belong to an object off a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[number]


def _lengths(lengths: Any, tokens: Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths, device=tokens.device)
    if lengths.shape != (len(tokens),) or lengths.is_floating_point() or bool((lengths < 0).any()):
        raise ReftError(
            f"{LENGTHS}: expected a number of prompt tokens for each of the {len(tokens)} rows, got {lengths.tolist()}."
        )
    return lengths


def _cache(values: Any) -> Any:
    """The keys and values, or the recurrent states, of the tokens that have passed."""
    return next((cache for name in CACHES if (cache := values.get(name)) is not None), None)


def _counts(cache: Any) -> bool:
    """Whether a cache knows how many tokens have passed; recurrent states alone do not."""
    layers = getattr(cache, "layers", [])
    return not layers or any(hasattr(layer, "get_seq_length") for layer in layers)


def _inputs(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """The token ids or embeddings of a call, none for a model that is given pictures or sound instead."""
    first = args[0] if args and getattr(module, "main_input_name", "input_ids") == "input_ids" else None
    for value in (kwargs.get("input_ids"), first, kwargs.get("inputs_embeds")):
        if isinstance(value, Tensor):
            return value
    return None
