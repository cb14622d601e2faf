"""Continuous batching (`generate_batch`): prompts of many requests, whole or in chunks, in one row of tokens.

Transformers' manager runs the model on such rows and tells it where each request's part begins and at which position,
but not where its prompt ends. `Batches` finds that at the manager, and turns the rules into the tokens to edit.
"""

import copy
import functools
import inspect
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ReftError
from .call import GIVEN, Call, innermost
from .located import Located
from .registry import Edits
from .resolve import resolve


class Batches:
    """The continuous batching of an adapted model.

    Args:
        edits: of a transformers model with `generate_batch`.
    """

    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self._model: Any = edits.model
        self._manager: Any = None  # a weak reference to the one that runs
        self._begun: Call | None = None  # with the adapters that were active when it was made

    def __getstate__(self) -> dict:  # a copy of the model has nothing in flight
        return {**self.__dict__, "_manager": None, "_begun": None}

    def begin(self) -> Call:
        """Return a call for a step of the manager: with the adapters that were active when its requests came."""
        return self.edits.begin({}) if self._begun is None else self._begun.again()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The model's method of this name, for what edits need of the manager.

        Keys and values of an edited prompt are those of its adapters: no request takes them from another. Which tokens
        are edited changes from step to step: no step is replayed as a CUDA graph.
        """
        outer = innermost(self.edits)  # `generate` with the cache that is called paged
        check_requests(
            [*getattr(outer, "given", ()), *(["adapter_names"] if getattr(outer, "row_adapters", None) else [])]
        )
        plain = functools.partial(type(self._model).init_continuous_batching, self._model)
        call = inspect.signature(plain).bind(*args, **kwargs)
        generation = call.arguments.get("generation_config") or self._model.generation_config
        config = call.arguments.get("continuous_batching_config")
        config = config or getattr(generation, "continuous_batching_config", None)
        if config is None:
            from transformers import ContinuousBatchingConfig

            config = ContinuousBatchingConfig()
        config = copy.copy(config)
        config.allow_block_sharing = config.use_cuda_graph = False
        call.arguments["continuous_batching_config"] = config
        manager = plain(*call.args, **call.kwargs)
        if manager.continuous_batching_config.allow_block_sharing:
            raise ReftError(
                "generate_batch: the model keeps a manager from before it was adapted, whose requests share keys and "
                "values; call destroy_cached_continuous_batching_manager() on the model first."
            )
        self._manager, self._begun = weakref.ref(manager), self.edits.begin({})
        return manager

    def locate(self, call: Call, inputs: Tensor, kwargs: dict[str, Any]) -> Located:
        """Return the tokens to edit in the row that the manager computes now.

        Args:
            call: the step.
            inputs: `[1, tokens]`, the parts of the requests one after the other, and perhaps padding.
            kwargs: of the call.
        """
        states = [request.state for request in self._requests()]
        bounds, positions = kwargs["cu_seq_lens_q"][: len(states) + 1], kwargs["position_ids"][0]
        lengths = [state._true_initial_tokens or len(state.initial_tokens) for state in states]
        rules = [rule for name in call.active for rule in self.edits.rules[name]]
        endless = any(rule is not None and rule.endless for rule in rules)
        if not states or not (endless or _in_a_prompt(bounds, positions, lengths)):
            return Located()
        width = max(lengths)
        prompts = [state.initial_tokens[:length] for state, length in zip(states, lengths, strict=True)]
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts], device=inputs.device)
        tokens = torch.arange(width, device=inputs.device) < torch.tensor(lengths, device=inputs.device)[:, None]
        whole = resolve(self.edits, call, "", tokens, None, ids)
        counts = bounds.diff().long()
        row = torch.repeat_interleave(torch.arange(len(states), device=inputs.device), counts)
        at = positions[: len(row)]
        located, made = Located(), {}
        padding = inputs.shape[1] - len(row)
        located.examples = torch.nn.functional.pad(row, (0, padding), value=len(states))[None]
        for key, mask in whole.masks.items():
            endless = key in whole.endless
            if (id(mask), endless) not in made:
                edited = mask[row, at.clamp(max=width - 1)] & (at < width)
                edited = torch.ones_like(edited) if endless else edited
                made[id(mask), endless] = torch.nn.functional.pad(edited, (0, padding))[None]
            located.add(key, made[id(mask), endless])
        return located

    def _requests(self) -> list[Any]:
        """The requests in the row that is computed now; none in a rehearsal."""
        manager = None if self._manager is None else self._manager()
        if manager is None or manager.batch_processor is None:
            return []
        io = manager.batch_processor.inputs_and_outputs
        pairs = getattr(io, "io_pairs", None)  # two, where the next row is prepared while one is computed
        return (io if pairs is None else pairs[io.current_pair].host_io).requests_in_batch


def check_requests(given: Iterable[str]) -> None:
    """Refuse what rows and calls may be given, and the requests of continuous batching, which go their own ways, not.

    Raises:
        ReftError: one of these names is among those given, and transformers would drop it.
    """
    for name in given:
        if name in (*GIVEN, "adapter_names"):
            raise ReftError(
                "continuous batching takes it for no request: all have the adapters, and their strengths, that the "
                "model has when it begins (set_adapter, set_strength). Or use generate with another cache.",
                setting=name,
            )


def _in_a_prompt(bounds: Tensor, positions: Tensor, lengths: list[int]) -> bool:
    """Whether any request's part begins in its prompt."""
    begins = positions[bounds[:-1].long()]
    return bool((begins < torch.tensor(lengths, device=begins.device)).any())
