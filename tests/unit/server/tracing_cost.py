"""What tracing adds to a request: the same requests to a server without and one with it, in turns.

python -m tests.unit.server.tracing_cost
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import sys
import time
from collections.abc import Sequence

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from engine.client import AsyncClient
from engine.client.testing import fake_server
from engine.server import tracing

_ROUNDS, _EACH = 40, 50


class Nowhere(SpanExporter):
    """Drops what it is given: the collector's own cost is not ours."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Drop them."""
        del spans
        return SpanExportResult.SUCCESS


async def measure(targets: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each request, by server; the servers are asked in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in targets}
    clients = {name: AsyncClient(target) for name, target in targets.items()}
    for number in range(_ROUNDS + 1):
        for name, client in clients.items():
            for _ in range(_EACH):
                began = time.perf_counter()
                await client.generate(prompt="hi", max_tokens=1, temperature=0)
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
    for client in clients.values():
        await client.close()
    return seconds


def main() -> None:
    """Print the medians."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    tracing._to_collector = lambda _: BatchSpanProcessor(Nowhere())  # type: ignore[assignment]
    collector = {"otlp_endpoint": "http://nowhere:4317"}
    with (
        fake_server() as off,
        fake_server() as again,
        fake_server(**collector) as traced,
        fake_server(**collector, trace_share=0.0) as unsampled,
    ):
        servers = {"off": off, "off, again": again, "on, nothing sampled": unsampled, "on, all": traced}
        found = asyncio.run(measure({name: server.target for name, server in servers.items()}))
    base = statistics.median(found["off"])
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        added = 1e6 * (middle - base)
        sys.stdout.write(f"{name:20} p50 {1e6 * middle:7.0f} us  {added:+6.0f} us  ({len(seconds)} requests)\n")


if __name__ == "__main__":
    main()
