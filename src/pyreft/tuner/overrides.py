"""What an adapted model does itself in place of transformers' methods of these names: `generate`, and four more."""

import inspect
import warnings
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from .caches import cache_of, counts, is_empty
from .call import Call, innermost, within
from .changing import one_at_a_time
from .continuous import Batches, check_requests
from .hooks import Preparing, past_of, take_given
from .located import Located, take
from .registry import Edits
from .resolve import resolve

_BY_TOKEN = ("inputs", "input_ids", "inputs_embeds", "attention_mask")  # of any type and width
METHODS = (
    *("generate", "prepare_inputs_for_generation", "delete_adapter"),
    *("init_continuous_batching", "generate_batch"),
)


class Methods:
    """The methods of an adapted model.

    Args:
        edits: of the model.
        batches: its continuous batching.
    """

    def __init__(self, edits: Edits, batches: Batches) -> None:
        self.edits, self.model, self.batches = edits, edits.model, batches
        self.prepare_inputs_for_generation = Preparing(edits)

    def attach(self) -> None:
        """Put them in the place of those of its class, if it has them."""
        for name in METHODS:
            if hasattr(self.model, name):
                setattr(self.model, name, getattr(self, name))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See `Batches`."""
        return self.batches.init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, which would drop what its requests cannot be given."""
        check_requests(kwargs)
        return type(self.model).generate_batch(self.model, *args, **kwargs)

    @one_at_a_time
    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As the model's, which takes our layers for parameters and passes them over."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        configs = dict(getattr(self.model, "peft_config", {}))
        heads = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        if all(name in configs for name in names):  # else nothing is deleted
            for name in names:
                del configs[name]
                if name in self.edits.rules:
                    self.edits.forget(name, configs, heads)
        type(self.model).delete_adapter(self.model, adapter_names)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, with the locations resolved on the whole prompt before its first forward.

        Also takes `prompt_lengths`, `intervention_locations`, `subspaces` and `strength`. Right-padded prompts are
        aligned to the right first, since generation continues the last column: the result is that of the left-padded
        batch.
        """
        args, kwargs = self._by_name(args, kwargs)
        given, outer = take_given(kwargs), innermost(self.edits)
        if isinstance(outer, Call) and getattr(kwargs.get("generation_config"), "is_assistant", False):
            call = outer.again()  # drafts for the very generation that runs, with a cache of its own
        else:
            self.edits.check_given(given)
            call = self.edits.begin(given)
            call.generating = True
            self._check_dropout(call)
            if (call.active or call.row_adapters is not None) and self.edits.stacks == ("",):
                args, kwargs = self._locate(call, args, kwargs)
        with within(call):
            answers = type(self.model).generate(self.model, *args, **kwargs)
        if self.edits.removed or len(self.edits.gone) > call.gone:
            self.edits.check_running(call)
        if call.generating and not isinstance(outer, Call):
            self.edits.tell_of_unreached(call)
        return answers

    def _by_name(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of `generate`, those given by their places by their names; what comes twice is refused."""
        signature = inspect.signature(type(self.model).generate)
        signature.bind_partial(self.model, *args, **kwargs)
        names = [name for name, one in signature.parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
        return args[len(names) :], {**dict(zip(names, args, strict=False)), **kwargs}

    def _token(self, name: str, kwargs: dict) -> Any:
        """A token of a call of `generate`: given with it, or by its config, or else by the model's."""
        if name in kwargs:
            return kwargs[name]
        value = getattr(kwargs.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def _check_dropout(self, call: Call) -> None:
        """Say that dropout falls on the answers of a model that was left in training."""
        names = call.active if call.row_adapters is None else dict.fromkeys(call.row_adapters)
        edits = (edit for layer in self.edits.layers for name in names for _, edit in layer.of(name))
        if any(edit.training and getattr(getattr(edit, "dropout", None), "p", 0) for edit in edits):
            warnings.warn(
                "generate: the edits are in training, so that their dropout falls on the answers. Call model.eval() "
                "before it, or, where a trainer generates, train with dropout=0.",
                UserWarning,
                stacklevel=3,
            )

    def _infer_mask(self, inputs: Tensor, kwargs: dict) -> Tensor | None:
        """The mask that `generate` infers from padding in the prompts where it is given none; none if it cannot."""
        pad, eos = self._token("pad_token_id", kwargs), self._token("eos_token_id", kwargs)
        ends = torch.as_tensor([] if eos is None else eos, device=inputs.device).flatten().tolist()
        if pad is None or inputs.dim() != 2 or inputs.is_floating_point() or pad in ends:
            return None
        mask = inputs.ne(pad)
        return None if bool(mask.all()) else mask.long()

    def _tell_of_cached(self, located: Located, cache: Any) -> None:
        """Warn, once, where a cache holds tokens of the prompts that were edited otherwise than they are to be.

        One that a generation left holds an earlier turn, whose edits were its own.
        """
        if self.edits.told_of_cached or is_empty(cache) or not counts(cache):
            return
        past, known = int(cache.get_seq_length()), past_of(self.edits, cache)
        held = Located() if known is None else known.located
        if held is not None and not held.agrees(located, past):
            self.edits.told_of_cached = True
            warnings.warn(
                f"The cache holds the first {past} tokens of the prompts, edited at others than the whole prompts are, "
                "so the answers differ from those without it. Fill it with prompt_lengths=[...], the numbers of tokens "
                "of the whole prompts; or, where the edits are behind it, with disable_adapter().",
                UserWarning,
                stacklevel=4,
            )

    def _locate(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Find the located tokens of the prompts; return the arguments with the prompts aligned to the right."""
        name = next((n for n in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
        if args:
            name, args, kwargs = "inputs", args[1:], {"inputs": args[0], **kwargs}
        if name is None:
            return args, kwargs
        inputs = kwargs[name]
        if kwargs.get("attention_mask") is None and (inferred := self._infer_mask(inputs, kwargs)) is not None:
            kwargs = {**kwargs, "attention_mask": inferred}
        mask = kwargs.get("attention_mask")
        tokens = inputs.new_ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        ids = inputs if inputs.dim() == 2 and inputs.shape == tokens.shape else None
        located = resolve(self.edits, call, "", tokens, None, ids)
        if call.row_adapters is None:
            self._tell_of_cached(located, cache_of(kwargs))
        if mask is not None and not bool(tokens[:, -1].all()) and is_empty(cache_of(kwargs)):
            order = tokens.long().argsort(dim=1, stable=True)
            for aligned in [key for key, value in kwargs.items() if _is_by_token(key, value, mask)]:
                kwargs[aligned] = take(kwargs[aligned], order)
            if (positions := kwargs.get("position_ids")) is not None:
                kwargs["position_ids"] = _align_positions(positions, order)
            located.reorder(order)
        call.located = located
        return args, kwargs


def _is_by_token(name: str, value: Any, mask: Tensor) -> bool:
    """Whether this is `[batch, tokens, ...]`: the prompts, or a mask or types of the same tokens."""
    if name in _BY_TOKEN:
        return value is not None
    alike = isinstance(value, Tensor) and value.shape == mask.shape and not value.is_floating_point()
    return alike and name != "position_ids"


def _align_positions(positions: Tensor, order: Tensor) -> Tensor:
    """Reorder the positions of tokens: `[batch, tokens]`, one row for all, or several of each, `[n, batch, tokens]`."""
    if positions.shape[-1] != order.shape[1]:
        return positions
    shape = (*positions.shape[:-2], *order.shape)
    return positions.expand(shape).gather(-1, order.expand(shape))
