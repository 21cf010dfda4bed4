"""Spans of the client, if the application uses OpenTelemetry: this package does not need it, nor imports it by itself."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import grpc

Metadata = Sequence[tuple[str, str | bytes]]
_ending: set[asyncio.Task[None]] = set()


def begun(method: str, metadata: Metadata) -> tuple[Metadata, Any]:
    """The metadata to send, and the call's span; None where the application has not imported OpenTelemetry.

    A traceparent that the application gave itself is sent as it is.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or any(key == "traceparent" for key, _ in metadata):
        return metadata, None
    span = trace.get_tracer("loraplex.client").start_span(
        method, kind=trace.SpanKind.CLIENT, attributes={"rpc.system.name": "grpc", "rpc.method": method}
    )
    found = span.get_span_context()
    if not found.is_valid:
        return metadata, None
    parent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"
    return (*metadata, ("traceparent", parent)), span


def ends_with(call: grpc.aio.Call, span: Any) -> None:
    """End the span when the call has ended, with its status."""
    if span is None:
        return

    def done(_: Any) -> None:
        task = asyncio.ensure_future(_end(call, span))
        _ending.add(task)
        task.add_done_callback(_ending.discard)

    call.add_done_callback(done)


async def _end(call: grpc.aio.Call, span: Any) -> None:
    trace: Any = sys.modules["opentelemetry.trace"]
    code = await call.code()
    span.set_attribute("rpc.response.status_code", code.name)
    if code is not grpc.StatusCode.OK:
        span.set_status(trace.StatusCode.ERROR, code.name)
    span.end()
