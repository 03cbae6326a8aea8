"""The figures of all workers as one page for Prometheus, each with its worker's number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ..serve.metrics import Metrics


class ClusterMetrics(Metrics):
    """A server's own counters, and beside them its workers'. `texts` gives each worker's page by its number."""

    def __init__(self, texts: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self._texts = texts

    def text(self) -> bytes:
        merged = CollectorRegistry()
        merged.register(_Merged(super().text().decode(), self._texts()))
        return generate_latest(merged)


class _Merged(Collector):
    def __init__(self, own: str, texts: Mapping[str, str]) -> None:
        self._own, self._texts = own, texts

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for worker, text in [(None, self._own), *self._texts.items()]:
            for family in text_string_to_metric_families(text):
                into = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                label = {} if worker is None else {"worker": worker}
                into.samples += [sample._replace(labels=sample.labels | label) for sample in family.samples]
        return found.values()
