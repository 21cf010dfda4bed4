"""What the router counts, beside what each replica counts of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.cluster.fleet import Fleet

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class RouterMetrics:
    """Prometheus metrics of one router process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._calls = Counter(
            "loraplex_router_calls", "gRPC calls, by method and status.", ["method", "code"], registry=r
        )
        self._seconds = Histogram(
            "loraplex_router_call_seconds", "Length of calls.", ["method"], buckets=_SECONDS, registry=r
        )
        self._failovers = Counter(
            "loraplex_router_failovers", "Replicas that failed a request that went on elsewhere.", ["when"], registry=r
        )

    def watch(self, fleet: Fleet) -> None:
        """Report the fleet whenever the metrics are read."""
        gauges = {
            "loraplex_router_replicas": ("Replicas that are known.", lambda: len(fleet.links)),
            "loraplex_router_usable_replicas": ("Replicas that take requests.", lambda: len(fleet.usable())),
            "loraplex_router_running": (
                "Requests on all engines.",
                lambda: sum(r.report.running for r in fleet.replicas),
            ),
            "loraplex_router_waiting": (
                "Requests that wait there.",
                lambda: sum(r.report.waiting for r in fleet.replicas),
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

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
