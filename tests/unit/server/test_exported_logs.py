"""The log at a collector: every event, with its facts, its exception and its span; and nothing changes on standard error."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider

from engine.config import Settings
from engine.errors import BadConfiguration
from engine.server import logs
from engine.server.exported_logs import LogExport


class Collector(logs_service_pb2_grpc.LogsServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """Keep it."""
        self.requests.append(request)
        return logs_service_pb2.ExportLogsServiceResponse()

    def records(self) -> list[tuple[Any, dict[str, Any]]]:
        """All records, each with its attributes."""
        found = []
        for request in self.requests:
            for scope in request.resource_logs[0].scope_logs:
                for record in scope.log_records:
                    values = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in record.attributes}
                    found.append((record, values))
        return found


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector on a real socket, and its address."""
    server, kept = grpc.server(futures.ThreadPoolExecutor(1)), Collector()
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(0)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to standard error."""
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    return text


@pytest.fixture
def configured(collector: tuple[Collector, str], lines: io.StringIO) -> Iterator[Collector]:
    """The process's log, sent to the collector."""
    assert not lines.getvalue()
    before = structlog.get_config()
    structlog.reset_defaults()
    logs.configure(Settings(engine="fake", otlp_endpoint=collector[1], otlp_logs=True, log_format="json"))
    yield collector[0]
    structlog.configure(**before)


def test_events_reach_the_collector(configured: Collector, lines: io.StringIO) -> None:
    """With severity, attributes, stack trace and span; the lines are what they were."""
    log = structlog.get_logger("test")
    with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("call") as span:
        log.info("call", method="Generate", seconds=0.5, labels={"a": "b"}, request_id="r1")
    try:
        raise KeyError("lost")
    except KeyError:
        log.exception("bug", request_id="r2")
    (exporter,) = [one for one in structlog.get_config()["processors"] if isinstance(one, LogExport)]
    exporter.close()
    (call, facts), (bug, about) = configured.records()
    assert (call.body.string_value, call.severity_text) == ("call", "info")
    assert facts == {"method": "Generate", "seconds": 0.5, "labels": "{'a': 'b'}", "request_id": "r1"}
    assert int.from_bytes(call.span_id, "big") == span.get_span_context().span_id
    assert (bug.severity_text, "KeyError: 'lost'" in about["exception.stacktrace"]) == ("error", True)
    assert int.from_bytes(bug.span_id or b"\0", "big") == trace.INVALID_SPAN_ID
    who = {one.key: one.value.string_value for one in configured.requests[0].resource_logs[0].resource.attributes}
    assert who["service.name"] == "loraplex"
    told = [json.loads(line) for line in lines.getvalue().splitlines() if line.startswith("{")]
    assert [(line["event"], line["request_id"]) for line in told] == [("call", "r1"), ("bug", "r2")]
    assert "KeyError: 'lost'" in told[1]["exception"]


def test_without_a_collector() -> None:
    """Who asks for it without saying where is told so."""
    with pytest.raises(BadConfiguration, match="otlp_endpoint"):
        logs.configure(Settings(engine="fake", otlp_logs=True))
