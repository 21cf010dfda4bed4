"""The process itself: its memory and files, how late its event loop is, and what vLLM counts in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Histogram, Metric
from prometheus_client.registry import Collector

_OTHERS = ("vllm:", "process_")  # vLLM's own metrics, and prometheus_client's of the process
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_LOOK_S = 0.25


class OtherMetrics(Collector):
    """What other libraries have put into prometheus_client's own registry, as far as it is about serving."""

    def collect(self) -> Iterator[Metric]:
        """Whatever is there when the metrics are read: vLLM's come and go with the engine."""
        for metric in REGISTRY.collect():
            if metric.name.startswith(_OTHERS):
                yield metric


class LoopLag:
    """How much later than it asked a task gets its turn: above some milliseconds, every stream stutters by that."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "loraplex_loop_lag_seconds",
            "How late the event loop is, looked at four times a second.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )

    async def run(self) -> None:
        """Look for ever."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            self._lag.observe(max(0.0, clock() - due))
