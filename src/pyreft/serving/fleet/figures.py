"""The figures of all replicas as those of one server, each with the replica that it is of."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families


class _Together:
    """A collector of Prometheus for texts that were collected elsewhere."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        count = GaugeMetricFamily("pyreft_replicas", "Replicas whose figures these are")
        count.add_metric([], len(self.texts))
        yield count
        found: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                metric = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        yield from found.values()


def together(told: Iterable[tuple[str, str]]) -> bytes:
    """Return the figures of replicas as one text, each with the label `replica`.

    Args:
        told: each replica's name and its figures, as Prometheus reads them.
    """
    registry: Any = CollectorRegistry()
    registry.register(_Together(dict(sorted(told))))
    return generate_latest(registry)
