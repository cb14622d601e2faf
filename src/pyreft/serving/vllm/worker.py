"""What `collective_rpc` may ask of a worker: what its slots hold, and to let one go."""

from typing import Any

from .state import ReftState


class ReftWorker:
    """Mixed into vLLM's worker by `--worker-extension-cls`."""

    vllm_config: Any

    def reft_stats(self) -> dict[str, Any]:
        """The digests in slots, the least recently used first, the memory they take, and counts of steps."""
        state = ReftState.of(self.vllm_config)
        return {"slots": list(state.slots.of), "bytes": state.bank.bytes(), **state.counts}

    def reft_drop(self, digest: str) -> bool:
        """Free an adapter's slot, unless a request has it or it has none."""
        slots = ReftState.of(self.vllm_config).slots
        if digest not in slots.of or slots.in_use(digest):
            return False
        slots.drop(digest)
        return True
