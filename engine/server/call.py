"""One call as everything that handles it sees it: its context, its request id, its trace; and what is logged of it."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import structlog
from grpc import aio

from engine.server import stalls
from engine.server.identity import FORWARDED_KEY, Principal
from engine.server.identity.rights import Need, check_adapter, sign
from engine.server.tracing import traceparent_of
from engine.server.validation import parse

_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_current: ContextVar[str] = ContextVar("traceparent", default="")

Context = aio.ServicerContext[Any, Any]


def request_id() -> str:
    """The id of the call that is being handled."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def traceparent() -> str:
    """The span of the call that is being handled, for others to put theirs below; empty if it is not traced."""
    return _current.get()


class Call:
    """One call: its id, and what is logged about it at its end."""

    def __init__(self, method: str, context: Context) -> None:
        self.method = method
        self.context = context
        self.started = time.monotonic()
        self.code = "OK"
        self.reason = ""
        self.need: Need | None = None
        self.principal: Principal | None = None
        self.recorded = False
        self.peer = str(context.peer())  # now: once gRPC has freed the call, asking for it ends the process
        self.facts: dict[str, Any] = {}
        self.request_id = _given_id(context) or uuid.uuid4().hex
        self.span: Any = None
        if trace := _given_trace(context):
            self.facts["trace_id"] = trace
        self._details: dict[str, Any] = {}
        self.task: asyncio.Task[Any] | None = None
        self._bind()

    def stalled(self) -> None:
        """End it: its reader takes nothing, so not even a status would reach it."""
        self.facts["problem"] = f"its reader took nothing for {stalls.STALLED_S:.0f} s"
        if self.task:
            self.task.cancel()

    def follow(self, span: Any) -> None:
        """It is traced: whatever is logged meanwhile names the span."""
        self.span = span
        _current.set(traceparent_of(span))
        _, trace, own, _ = _current.get().split("-")
        self.facts.pop("trace_id", None)
        structlog.contextvars.bind_contextvars(trace_id=trace, span_id=own)

    def read(self, deserializer: Callable[[bytes], Any] | None, data: bytes) -> Any:
        """Parse and check a message; a request id inside it becomes the call's."""
        request = parse(deserializer, data)
        inner = getattr(request, "request", request)
        if given := getattr(inner, "request_id", ""):
            self.request_id = given
            self._bind()
        if adapter := getattr(inner, "adapter", ""):
            self.facts["adapter"] = adapter
        if labels := getattr(inner, "labels", None):
            self.facts["labels"] = dict(labels)
        if self.need:
            self._authorize(self.need, request)
        return request

    def audit(self) -> dict[str, Any]:
        """What the audit log says about it, beside who and what."""
        via = {"forwarded_for": address} if (address := _value(self.context, FORWARDED_KEY)) else {}
        told = {"reason": self.reason, "request_id": self.request_id, "peer": self.peer, **via}
        return {**self._details, **told}

    def _authorize(self, need: Need, request: Any) -> None:
        if need.audited:
            named = need.adapter(request)
            if named is not None:
                self._details = {"adapter": named, "detail": need.details(request)}
        if self.principal:
            check_adapter(need, self.principal, request)
            sign(request, self.principal)

    def _bind(self) -> None:
        structlog.contextvars.bind_contextvars(request_id=self.request_id)


def _given_trace(context: Context) -> str:
    """The trace that the call belongs to, by the caller's traceparent (https://www.w3.org/TR/trace-context)."""
    found = _TRACE.fullmatch(_value(context, "traceparent"))
    return found[1] if found else ""


def _given_id(context: Context) -> str:
    """A well-formed x-request-id of the caller's metadata, else nothing."""
    value = _value(context, "x-request-id")
    return value if _REQUEST_ID.fullmatch(value) else ""


def _value(context: Context, wanted: str) -> str:
    """The first value of the caller's metadata by this key, or nothing."""
    for key, value in context.invocation_metadata() or ():
        if key == wanted and isinstance(value, str):
            return value
    return ""
