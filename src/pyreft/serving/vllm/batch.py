"""Which request has which row of the batch, by the documented interface for logits processors. Logits stay."""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ...errors import ReftError
from ..catalog import Store, default_store
from .flags import STORES, digest_of
from .state import ReftState


class ReftRows(LogitsProcessor, LogitsProcessorV2):
    """For runner V1 it keeps the rows; runner V2, whose rows `ReftModelState` keeps, asks it about parameters alone."""

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        self.state = None if vllm_config.use_v2_model_runner else ReftState.of(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose adapter is not in the store, before an engine sees it.

        Raises:
            ReftError: which is a `ValueError`, so that the client is told.
        """
        asked = digest_of(sampling_params.extra_args)
        if asked is not None:
            check_known(asked[0])

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any, *rest: Any) -> Any:
        return logits

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Runner V2: nothing is changed for any request."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Runner V1: rows that were removed, added and moved, in this order."""
        state = self.state
        if batch_update is None or state is None:
            return
        for number in batch_update.removed:
            state.remove(number)
        for number, params, prompt, _ in batch_update.added:
            state.add(number, digest_of(params.extra_args), len(prompt))
        for old, new, how in batch_update.moved:
            state.move(old, new, how == MoveDirectionality.SWAP)
        state.settle()


_stores: dict[str, Store] = {}


def check_known(digest: str) -> None:
    """Refuse a digest that is in none of the stores that this process knows of; which engine asks is not told.

    Raises:
        ReftError: this.
    """
    for root in {str(default_store()), *STORES}:
        try:
            _stores.setdefault(root, Store(root)).get(digest)
            return
        except ReftError as error:
            refused = error
    raise refused
