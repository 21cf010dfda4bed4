"""A call's metadata on its way through: the caller's own, and the request id that the router's log has."""

from __future__ import annotations

import secrets

from engine.server.boundary import Context, request_id

_TRACE = "traceparent"
_OWN = ("user-agent", "x-request-id")  # of one connection, and what the router settles


def passed_on(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    """Tenant, credentials and trace (traceparent, tracestate) as they came, x-request-id, and a trace if there is none."""
    theirs = tuple(
        (key, value) for key, value in context.invocation_metadata() or () if key not in _OWN and key[:5] != "grpc-"
    )
    traced = () if any(key == _TRACE for key, _ in theirs) else ((_TRACE, _new_trace()),)
    return (*theirs, *traced, ("x-request-id", request_id()))


def _new_trace() -> str:
    """A W3C trace context (https://www.w3.org/TR/trace-context) that begins here."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
