"""What the router counts, beside what each replica counts of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.cluster.fleet import Fleet
from engine.cluster.routing import Replica
from engine.server.metrics import SECONDS
from engine.server.process import OtherMetrics


class RouterMetrics:
    """Prometheus metrics of one router process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._calls = Counter(
            "loraplex_router_calls", "gRPC calls, by method and status.", ["method", "code"], registry=r
        )
        self._seconds = Histogram(
            "loraplex_router_call_seconds", "Length of calls.", ["method"], buckets=SECONDS, registry=r
        )
        self._failovers = Counter(
            "loraplex_router_failovers", "Replicas that failed a request that went on elsewhere.", ["when"], registry=r
        )
        r.register(OtherMetrics())

    def watch(self, fleet: Fleet) -> None:
        """Report every replica whenever the metrics are read."""
        self.registry.register(_Replicas(fleet))

    def call(self, method: str, code: str, seconds: float) -> None:
        """Count a finished call."""
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def failed_over(self, count: int, *, resumed: bool) -> None:
        """Count replicas that failed a request, before its first token or after."""
        self._failovers.labels("after tokens" if resumed else "before the first token").inc(count)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Replicas(Collector):
    """What the router knows of each replica, by address: sums and comparisons are Prometheus' business."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """One gauge for each fact."""
        facts: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "usable": ("1 while it gets requests.", lambda one: float(one.usable)),
            "running": ("Requests on its engine, by its latest report.", lambda one: one.report.running),
            "waiting": ("Requests that wait there.", lambda one: one.report.waiting),
            "sent": ("Requests of this router that are under way there.", lambda one: one.sent),
            "adapters": ("Adapters in its engine.", lambda one: sum(map(len, one.report.residents.values()))),
        }
        for name, (text, value) in facts.items():
            family = GaugeMetricFamily(f"loraplex_router_replica_{name}", text, labels=["replica"])
            for replica in self._fleet.replicas:
                family.add_metric([replica.id], value(replica))
            yield family
