"""Which tokens are edited in the forward that runs now.

A `Locator` belongs to one model. It turns the position rules, or locations given with a call, into masks of absolute
token indices once, where a sequence begins, and hands each later forward the part that falls into the window of
tokens it computes. So one-shot and chunked prefill, a reused prefix, decoding, beams and padding are one mechanism.
The formulas and the places in the network are not known here.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ReftError
from .interventions import LowRankRotateLayer, orthonormalize
from .positions import Positions, prompt_tokens

Key = tuple[str, int]  # an adapter and the number of one of its representations
Window = tuple[Tensor, Tensor] | None  # row and column of every token to edit; none for every token there is
CACHES = ("past_key_values", "cache_params")
LOCATIONS, LENGTHS = "intervention_locations", "prompt_lengths"  # what a call may give


class Located:
    """The located tokens of a batch of sequences.

    Args:
        masks: `[batch, tokens]` in absolute token indices; representations with the same rule share the tensor.
        endless: those that cover every token after the mask, too.
    """

    def __init__(self, masks: dict[Key, Tensor], endless: set[Key]) -> None:
        self.masks = masks
        self.endless = endless
        self.length = max((mask.shape[1] for mask in masks.values()), default=0)

    def done(self, end: int) -> bool:
        """Whether nothing is located from this index on."""
        return end >= self.length and not self.endless

    def windows(self, past: int, tokens: int, rows: int) -> dict[Key, Window]:
        """What to edit in a forward over the tokens `[past, past + tokens)`.

        Rows that beams or several answers to a prompt have multiplied share the locations of their prompt.
        """
        found: dict[Key, Window] = {}
        seen: dict[tuple[int, bool], Window] = {}
        for key, mask in self.masks.items():
            endless = key in self.endless
            if endless and past >= self.length:
                found[key] = None
                continue
            same = id(mask), endless
            if same not in seen:
                part = mask[:, past : past + tokens]
                if endless:
                    part = nn.functional.pad(part, (0, tokens - part.shape[1]), value=True)
                part = part.repeat_interleave(rows // len(part), dim=0)
                seen[same] = part.nonzero(as_tuple=True)  # type: ignore[assignment]
            at = seen[same]
            if at is not None and len(at[0]):
                found[key] = at
        return found


class Locator:
    """Resolves the locations before each forward of a model and serves them to its edited layers.

    Args:
        model: the adapted base model, whose `forward` takes `input_ids` or `inputs_embeds`.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.layers: list[Any] = []  # the ReftLayers of the model
        self.rules: dict[str, list[Positions | None]] = {}  # of each adapter, by representation
        self.windows: dict[Key, Window] = {}
        self.rows = self.tokens = 0
        self._end = 0  # how many tokens will have passed after this forward; 0 where nobody counts them
        self._located: Located | None = None
        self._generating: Located | None = None
        self._generated = False
        self._known: weakref.WeakKeyDictionary[Any, Located] = weakref.WeakKeyDictionary()
        self._passed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # tokens in recurrent states
        self.removed = False
        self._running: nn.Module | None = None  # the entry whose forward runs
        self._hooked = False
        self._causal = hasattr(model, "can_generate") and model.can_generate()
        self._rotations: list[LowRankRotateLayer] = []
        backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
        # some trainers call the backbone directly, without the head
        self._entries = [model, backbone] if isinstance(backbone, nn.Module) and backbone is not model else [model]
        for entry in self._entries:
            entry.register_forward_pre_hook(self._before, with_kwargs=True)
            entry.register_forward_hook(self._after, always_call=True)
        if hasattr(model, "generate"):
            self.model.generate = self.generate

    def __getstate__(self) -> dict:  # a copy of the model starts with nothing in flight
        return {**self.__dict__, "_known": None, "_passed": None, "_located": None, "windows": {}, "_rotations": []}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _known=weakref.WeakKeyDictionary(), _passed=weakref.WeakKeyDictionary())

    def remove(self) -> None:
        """Take every hook off the model."""
        self.removed = True
        self._hook(False)
        for entry in self._entries:
            for hooks in (entry._forward_pre_hooks, entry._forward_hooks):
                for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[number]
        self.model.__dict__.pop("generate", None)

    @property
    def active(self) -> list[str]:
        """The adapters whose edits are switched on, in their order."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.enabled_adapters)
        return list(names)

    # -- around a forward -----------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if module is not self.model and self._running is self.model:
            return None  # the backbone, called by the model
        self._running = module
        if self._generated and _cache(kwargs) is not None:
            self._hook(False)  # decoding after the last located token: nothing to compute
            self._end += _inputs(args, kwargs).shape[1]
            return None
        given = {name: kwargs.pop(name) for name in (LOCATIONS, LENGTHS) if name in kwargs}
        self._end = 0
        if self.active:  # where adapters are switched off, what the last edited forward saw stays for its backward
            past, inputs = self._past_length(_cache(kwargs)), _inputs(args, kwargs)
            self._end = past + inputs.shape[1]
            self._located = self._generating or self._locate(given, past, inputs, kwargs)
            self.rows, self.tokens = inputs.shape[:2]
            self.windows = self._located.windows(past, self.tokens, self.rows)
            self._generated = self._generating is not None and self._located.done(past + self.tokens)
            self._hook(bool(self.windows))
            if self.windows:
                self._rotations = [rotation for layer in self.layers for rotation in layer.rotations(self.windows)]
                orthonormalize(self._rotations)
        return (args, kwargs) if given else None

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not self._running:
            return
        self._running = None
        cache = _cache(output) if hasattr(output, "get") else None
        if cache is not None and self._end and not _counts(cache):
            self._passed[cache] = self._end
        if self._generating is not None:
            return
        if not self._recomputes():
            for rotation in self._rotations:
                rotation.forget_graph()
            self._rotations, self.windows = [], {}
            self._hook(False)
        if cache is not None and self._located is not None:
            self._known[cache] = self._located
        self._located = None

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

    def _recomputes(self) -> bool:
        """Whether the backward will compute the blocks, and so the edits inside them, once more."""
        return (
            self.model.training
            and torch.is_grad_enabled()
            and any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        )

    def _locate(self, given: dict[str, Any], past: int, inputs: Tensor, kwargs: dict) -> Located:
        cache = _cache(kwargs)
        if past and not given and cache in self._known:
            return self._known[cache]
        rows, end = inputs.shape[0], past + inputs.shape[1]
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if not (isinstance(mask, Tensor) and mask.shape == (rows, end)):
            mask = inputs.new_ones((rows, end), dtype=torch.bool)
        if not (self._causal and isinstance(labels, Tensor) and labels.shape == (rows, end)):
            labels = None  # none, or not those of a language model
        return self.resolve(mask.bool(), labels, **given)

    def _hook(self, wanted: bool) -> None:
        if wanted is not self._hooked:
            for layer in self.layers:
                layer.set_hooked(wanted)
            self._hooked = wanted

    # -- from rules to masks --------------------------------------------------------------------------------------

    def resolve(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        prompt_lengths: Any = None,
        intervention_locations: Any = None,
    ) -> Located:
        """Return the located tokens of the active adapters.

        Args:
            tokens: `[batch, tokens]`, false for padding.
            labels: `[batch, tokens]`, -100 where there is no loss; the prompt ends before the first label.
            prompt_lengths: `[batch]` numbers of tokens, where they are known; longer than `tokens` if more follow.
            intervention_locations: `[batch, interventions, positions]` indices, which replace the rules; -1 is none.
        """
        if intervention_locations is not None:
            return self._resolve_given(tokens, intervention_locations)
        if prompt_lengths is not None:
            prompt_lengths = _lengths(prompt_lengths, tokens)
            missing = int((prompt_lengths - tokens.sum(-1)).max())
            tokens = nn.functional.pad(tokens, (0, max(missing, 0)), value=True)
        prompt = prompt_tokens(tokens, labels, prompt_lengths)
        masks: dict[Key, Tensor] = {}
        endless: set[Key] = set()
        made: dict[Positions, Tensor] = {}
        for name in self.active:
            for index, rule in enumerate(self.rules[name]):
                if rule is None:
                    continue
                # an answer is covered by `all` from the beginning
                if rule not in made:
                    made[rule] = tokens if rule.whole == "all" else rule.locate(prompt)
                masks[name, index] = made[rule]
                if rule.whole == "all":
                    endless.add((name, index))
        return Located(masks, endless)

    def _resolve_given(self, tokens: Tensor, locations: Any) -> Located:
        at = torch.as_tensor(locations, device=tokens.device)
        if at.dim() != 3 or at.shape[0] != len(tokens) or at.is_floating_point():
            raise ReftError(
                f"{LOCATIONS}: expected whole numbers of the shape [batch, interventions, positions] for a batch of "
                f"{len(tokens)}, got {list(at.shape)}{' of ' + str(at.dtype) if at.is_floating_point() else ''}."
            )
        for name in self.active:
            if at.shape[1] != len(self.rules[name]):
                raise ReftError(
                    f"{LOCATIONS}: the adapter {name!r} has {len(self.rules[name])} interventions, "
                    f"locations came for {at.shape[1]} (shape [batch, interventions, positions] = {list(at.shape)})."
                )
        if at.numel() and (int(at.max()) >= tokens.shape[1] or int(at.min()) < -1):
            raise ReftError(
                f"{LOCATIONS}: expected indices from 0 to {tokens.shape[1] - 1} in rows of {tokens.shape[1]} tokens "
                f"(-1 for none), got {int(at.min())} to {int(at.max())}."
            )
        if bool((at == at[:, :1]).all()):
            mask = _mask(at[:, 0], tokens.shape[1])
            masks = [mask] * at.shape[1]
        else:
            masks = [_mask(at[:, index], tokens.shape[1]) for index in range(at.shape[1])]
        return Located({(name, i): mask for name in self.active for i, mask in enumerate(masks)}, set())

    # -- generation -----------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, with the locations resolved on the whole prompt before its first forward.

        Also takes `prompt_lengths` and `intervention_locations`. Right-padded prompts are aligned to the right
        first, since generation continues the last column: the result is that of the left-padded batch.
        """
        plain = functools.partial(type(self.model).generate, self.model)
        given = {name: kwargs.pop(name) for name in (LOCATIONS, LENGTHS) if name in kwargs}
        if self._generating is not None or not self.active:
            return plain(*args, **kwargs)
        name = next((n for n in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
        if args:
            name, args, kwargs = "inputs", args[1:], {"inputs": args[0], **kwargs}
        if name is None:
            return plain(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        tokens = kwargs[name].new_ones(kwargs[name].shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        located = self.resolve(tokens, **given)
        if mask is not None and kwargs.get("past_key_values") is None and not bool(tokens[:, -1].all()):
            order = tokens.long().argsort(dim=1, stable=True)
            for aligned in [key for key, value in kwargs.items() if key == name or _is_by_token(value, mask)]:
                kwargs[aligned] = _take(kwargs[aligned], order)
            located.masks = {key: _take(mask, order) for key, mask in located.masks.items()}
        self._generating, self._generated = located, False
        try:
            return plain(*args, **kwargs)
        finally:
            self._generating, self._generated, self._running, self._located = None, False, None, None
            self.windows = {}
            self._hook(False)


def _take(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of `[batch, tokens, ...]`."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], order]


def _is_by_token(value: Any, mask: Tensor) -> bool:
    """Whether this is a mask, ids or types of the same tokens."""
    return isinstance(value, Tensor) and value.shape == mask.shape and not value.is_floating_point()


def _mask(columns: Tensor, length: int) -> Tensor:
    """`[batch, positions]` indices as a mask `[batch, length]`; -1 is none."""
    mask = columns.new_zeros((len(columns), length + 1), dtype=torch.bool)
    return mask.scatter(1, columns.long() % (length + 1), True)[:, :length]


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


def _inputs(args: tuple, kwargs: dict) -> Tensor:
    for value in (kwargs.get("input_ids"), args[0] if args else None, kwargs.get("inputs_embeds")):
        if isinstance(value, Tensor):
            return value
    raise ReftError("An adapted model needs input_ids or inputs_embeds, of the shape [batch, tokens, ...].")
