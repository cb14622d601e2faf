"""What Prometheus reads at `/metrics`: requests, tokens, latencies by model; queue and slots."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Gauges:
    """The figures of one server.

    Args:
        now: figures of this moment by name, each with what it says and where it comes from.
    """

    def __init__(self, now: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pyreft_requests", "Requests by how they ended", ("model", "outcome"), registry=self.registry
        )
        self.prompt_tokens = Counter("pyreft_prompt_tokens", "Tokens read", ("model",), registry=self.registry)
        self.answer_tokens = Counter("pyreft_answer_tokens", "Tokens answered", ("model",), registry=self.registry)
        self.first = Histogram(
            "pyreft_first_token_seconds",
            "From a request to its first token",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "pyreft_request_seconds", "From a request to its end", ("model",), buckets=_SECONDS, registry=self.registry
        )
        for name, (text, read) in now.items():
            Gauge(f"pyreft_{name}", text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)
