"""A call's metadata on its way through: the caller's own, and the request id that the router's log has."""

from __future__ import annotations

import secrets

from engine.server.call import Context, request_id, traceparent
from engine.server.identity import FORWARDED_KEY

_TRACE = "traceparent"
_OWN = ("user-agent", "x-request-id", FORWARDED_KEY)  # of one connection, and what the router settles


def passed_on(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    """Tenant, credentials and trace (traceparent, tracestate) as they came, x-request-id, and a trace if there is none.

    It also says that the call is somebody else's, so that a replica does not take it for the router's because of the
    certificate that the router shows. If the router makes spans itself, the replica's are below this call's.
    """
    own = traceparent()
    theirs = tuple(
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key not in _OWN and key[:5] != "grpc-" and not (own and key == _TRACE)
    )
    traced = () if any(key == _TRACE for key, _ in theirs) else ((_TRACE, own or _new_trace()),)
    return (*theirs, *traced, ("x-request-id", request_id()), (FORWARDED_KEY, context.peer()))


def _new_trace() -> str:
    """A W3C trace context (https://www.w3.org/TR/trace-context) that begins here."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
