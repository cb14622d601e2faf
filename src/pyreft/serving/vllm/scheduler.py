"""The scheduler: cached blocks of different adapters are kept apart, and no more adapters are in a batch than slots."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from ...errors import ReftError
from ..catalog import Store
from .flags import Settings, check_adapter, check_engine, digest_of
from .private import check_scheduler, check_vllm, fail_request, key_blocks


class ReftScheduler(AsyncScheduler):
    """vLLM's own, which knows the adapter of each request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_vllm()
        check_scheduler(self)
        check_engine(self.vllm_config)
        self.reft = Settings.of(self.vllm_config)
        self._reft_store = Store(self.reft.store)
        self._reft_of: dict[str, str] = {}  # request -> digest
        self._reft_bad: set[str] = set()  # requests that end with an error
        self._reft_here: tuple[tuple[int, int], set[str]] = ((-1, -1), set())

    def add_request(self, request: Any) -> None:
        """Take a request, whose hashes name its adapter from the first edited token on."""
        params = request.sampling_params
        try:
            asked = digest_of(params.extra_args if params is not None else None)
            if asked is not None and request.request_id not in self.requests:
                self._take(request, *asked)
        except (ReftError, OSError):  # validated where it came in: a copy that was deleted since
            self._reft_bad.add(request.request_id)
        super().add_request(request)

    def _take(self, request: Any, digest: str, strength: float) -> None:
        if request.resumable:
            raise ReftError("a prompt that goes on while it is computed cannot have an adapter.", setting="vLLM")
        adapter = self._reft_store.get(digest)
        check_adapter(adapter, self.vllm_config)
        spans = adapter.row(0, request.num_prompt_tokens).spans
        name = digest if strength == 1 else f"{digest}@{strength!r}"
        key_blocks(request, self.hash_block_size, name, spans)
        self._reft_of[request.request_id] = digest

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Whether a waiting request may start now."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        if request.request_id in self._reft_bad:
            self._reft_bad.discard(request.request_id)
            fail_request(self, request)
            return False
        digest = self._reft_of.get(request.request_id)
        if digest is None:
            return True
        here = self._running_digests()
        if digest in here or len(here) >= self.reft.slots:
            return digest in here
        if not self._reft_store.has(digest):  # deleted while this one waited: no worker could load it
            fail_request(self, request)
            return False
        return True

    def _running_digests(self) -> set[str]:
        moment = self.current_step, len(self.running)
        if self._reft_here[0] != moment:
            found = {digest for r in self.running if (digest := self._reft_of.get(r.request_id)) is not None}
            self._reft_here = moment, found
        return self._reft_here[1]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._reft_of.pop(request.request_id, None)
        self._reft_bad.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)
