"""Runner V2: the rows of its batch, by the state that it asks a model for."""

from functools import lru_cache
from typing import Any

from .flags import digest_of
from .state import ReftState


def model_state_class(model: Any) -> type:
    """The state's class of a model that has its own or the default, with the rows of adapters.

    Args:
        model: the model as its base class sees it.
    """
    own = getattr(model, "get_model_state_cls", None)
    if own is not None:
        return _with_rows(own())
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return _with_rows(DefaultModelState)


@lru_cache
def _with_rows(base: type) -> type:
    return type(f"Reft{base.__name__}", (ReftModelState, base), {})


class ReftModelState:
    """Mixed into a `ModelState`: rows are its request slots, and each step is planned before its forward."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._reft = ReftState.of(vllm_config)
        self._reft_index: dict[str, int] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request takes a slot of the runner."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        params = new_req_data.sampling_params
        self._reft.add(req_index, digest_of(params and params.extra_args), new_req_data.prompt_len)
        self._reft_index[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        """A request has ended or was put back; one that was never added is none of ours."""
        super().remove_request(req_id)  # type: ignore[misc]
        if (number := self._reft_index.pop(req_id, None)) is not None:
            self._reft.remove(number)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Plan the step, whose rows the runner has put into an order of its own."""
        state, count = self._reft, input_batch.num_reqs
        state.settle()
        starts = input_batch.query_start_loc_np[: count + 1].tolist()
        order = input_batch.idx_mapping_np[:count].tolist()
        state.plan(starts, input_batch.num_computed_tokens_np[:count].tolist(), order)
        return super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
        """A forward without requests edits nothing."""
        self._reft.plan_nothing()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]
