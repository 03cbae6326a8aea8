"""Figures for Prometheus: one registry per server, no session's name in any label."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)

Gauges = Callable[[], Iterable[tuple[str, str, str, dict[str, float]]]]  # name, help, label, value by label


class Metrics:
    """Counters that the parts of a server turn, and gauges that are read when somebody asks."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.chunks = Counter("longtake_chunks", "Chunks made", ["model"], registry=r)
        self.chunk_seconds = Histogram(
            "longtake_chunk_seconds", "Seconds a chunk took", ["model"], buckets=_SECONDS, registry=r
        )
        self.created = Counter("longtake_sessions_created", "Sessions begun", registry=r)
        self.refused = Counter("longtake_refused", "Requests refused", ["code"], registry=r)
        self.parked = Counter("longtake_parked", "Sessions that went to disk", registry=r)
        self.park_failed = Counter("longtake_park_failed", "Sessions that could not go to disk", registry=r)
        self.recovered = Counter("longtake_recovered", "Sessions that came back from the log", registry=r)
        self.recovery_seconds = Histogram(
            "longtake_recovery_seconds", "Seconds until a session was back", buckets=_SECONDS, registry=r
        )
        self.expired = Counter("longtake_expired", "Sessions and snapshots deleted by age", registry=r)

    def add(self, gauges: Gauges) -> None:
        self.registry.register(_Reader(gauges))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Reader(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, about, label, values in self._gauges():
            family = GaugeMetricFamily(name, about, labels=[label] if label else [])
            for value_of, value in values.items():
                family.add_metric([value_of] if label else [], value)
            yield family
