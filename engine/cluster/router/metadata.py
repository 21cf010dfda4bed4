"""A call's metadata on its way through: the caller's own, and the request id that the router's log has."""

from __future__ import annotations

from engine.server.boundary import Context, request_id

_OWN = ("user-agent", "x-request-id")  # of one connection, and what the router settles


def passed_on(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    """Tenant, credentials and trace (traceparent, tracestate) as they came, and x-request-id."""
    theirs = tuple(
        (key, value) for key, value in context.invocation_metadata() or () if key not in _OWN and key[:5] != "grpc-"
    )
    return (*theirs, ("x-request-id", request_id()))
