"""One request is one trace, from the application's own span through client, router and server to the engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.client import AsyncClient
from engine.client.errors import NotFound
from engine.client.testing import FakeServer, fake_server
from engine.cluster.fleet import StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from engine.server import boundary, tracing
from tests.unit.server.conftest import until

COLLECTOR = "http://127.0.0.1:1"  # nothing is sent there: the exporter is replaced


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What this test's server and router, and the application, have told."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_to_collector", lambda _: SimpleSpanProcessor(exporter))
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


@pytest.fixture
def traced(spans: InMemorySpanExporter) -> Iterator[FakeServer]:
    """A server that traces."""
    assert spans is not None
    with fake_server(otlp_endpoint=COLLECTOR) as server:
        yield server


def tree(spans: InMemorySpanExporter, trace_id: int) -> dict[str, str]:
    """Names of one trace's spans, each with its parent's; the services are told apart."""

    def name(span: ReadableSpan) -> str:
        service = str(span.resource.attributes.get("service.name", ""))
        return f"{'' if service.startswith('unknown') else service}:{span.name}"

    found = [span for span in spans.get_finished_spans() if span.context and span.context.trace_id == trace_id]
    by_id = {span.context.span_id: name(span) for span in found if span.context}
    return {name(span): by_id.get(span.parent.span_id, "?") if span.parent else "" for span in found}


async def test_one_trace_through_client_router_and_server(traced: FakeServer, spans: InMemorySpanExporter) -> None:
    """Every span hangs on the one before; the parts of the request's way are below the server's."""
    ref = f"support@{traced.publish('support')}"
    router = RouterApp(RouterSettings(port=0, http_port=0, otlp_endpoint=COLLECTOR), StaticSource([traced.target]))
    await router.start()
    try:
        async with AsyncClient(f"127.0.0.1:{router.port}") as client:
            with trace.get_tracer("application").start_as_current_span("application") as own:
                async for _ in client.stream(adapter="support", prompt="hi", max_tokens=5, temperature=0):
                    pass
        call = "loraplex.v1.GenerationService/GenerateStream"
        await until(lambda: len(tree(spans, own.get_span_context().trace_id)) == 9)
    finally:
        await router.stop()
    assert tree(spans, own.get_span_context().trace_id) == {
        ":application": "",
        f":{call}": ":application",
        f"loraplex-router:{call}": f":{call}",
        f"loraplex:{call}": f"loraplex-router:{call}",
        "loraplex:admission": f"loraplex:{call}",
        "loraplex:adapter": f"loraplex:{call}",
        f"loraplex:text_completion {ref}": f"loraplex:{call}",
        "loraplex:prefill": f"loraplex:text_completion {ref}",
        "loraplex:decode": f"loraplex:text_completion {ref}",
    }
    (engine,) = [span for span in spans.get_finished_spans() if span.name.startswith("text_completion")]
    attributes: Any = engine.attributes
    assert attributes["gen_ai.response.model"] == ref
    assert (attributes["gen_ai.usage.input_tokens"] > 0, attributes["gen_ai.usage.output_tokens"]) == (True, 5)
    (server,) = [
        s for s in spans.get_finished_spans() if s.name == call and s.resource.attributes["service.name"] == "loraplex"
    ]
    times: Any = (server.start_time, engine.start_time, engine.end_time, server.end_time)
    slack = 50_000_000  # two clocks tell the time of one process
    assert times[0] - slack <= times[1] <= times[2] <= times[3] + slack


async def test_a_failed_call_and_the_log(
    traced: FakeServer, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the caller did wrong is no error of ours; the log names the trace that a given traceparent began."""
    given = f"00-{'ab' * 16}-{'cd' * 8}-01"
    kept = structlog.testing.LogCapture()
    processors = [structlog.contextvars.merge_contextvars, kept]
    monkeypatch.setattr(boundary, "log", structlog.wrap_logger(None, processors, structlog.BoundLogger))
    async with AsyncClient(traced.target, metadata=[("traceparent", given)]) as client:
        with pytest.raises(NotFound):
            await client.generate(adapter="nobody", prompt="hi")
    await until(lambda: kept.entries)
    (line,) = kept.entries
    assert line["trace_id"] == "ab" * 16
    (span,) = [one for one in spans.get_finished_spans() if one.context and one.context.trace_id == int("ab" * 16, 16)]
    assert span.context
    assert line["span_id"] == f"{span.context.span_id:016x}"
    assert span.attributes
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert span.status.status_code is trace.StatusCode.UNSET


async def test_a_caller_who_does_not_sample_is_not_traced(traced: FakeServer, spans: InMemorySpanExporter) -> None:
    """The first one decides, whatever the share here."""
    async with AsyncClient(traced.target, metadata=[("traceparent", f"00-{'ef' * 16}-{'cd' * 8}-00")]) as client:
        await client.generate(prompt="hi")
    assert tree(spans, int("ef" * 16, 16)) == {}


def test_off_imports_nothing(tmp_path: Path) -> None:
    """Neither the server nor the client brings OpenTelemetry in when nobody asked for traces."""
    code = """
import sys
from engine.client import Client
from engine.client.testing import fake_server
with fake_server() as server, Client(server.target) as client:
    client.generate(prompt="hi")
sys.exit(any(name.startswith("opentelemetry") for name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3], env={"HOME": str(tmp_path)}
    )
    assert done.returncode == 0
