"""A refused call as HTTP tells it: read from the gRPC status that the services' own boundary made of the error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc import aio

from engine.errors import InvalidRequest, LoraplexError
from engine.server.status import code_of, details_of, trailers_of

# The mapping of https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
_HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@dataclass
class Refusal:
    """Why a call was refused: everything that gRPC callers learn of it, too."""

    code: str
    message: str
    reason: str = ""
    fix: str = ""
    request_id: str = ""
    violations: list[tuple[str, str]] = field(default_factory=list)
    retry_after_s: float | None = None
    http: int = 0  # for what only HTTP knows

    @property
    def http_status(self) -> int:
        """The HTTP status of the same meaning."""
        return self.http or _HTTP.get(self.code, 500)

    @property
    def headers(self) -> dict[str, str]:
        """When to try again, and whether at all: the official OpenAI client obeys them."""
        found = {"x-should-retry": "true" if self.retry_after_s is not None else "false"}
        if self.retry_after_s is not None:
            found["retry-after-ms"] = str(round(self.retry_after_s * 1000))
            found["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.request_id:
            found["x-request-id"] = self.request_id
        return found


class Refused(aio.AbortError):
    """Raised where gRPC would end the call with this status."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def read(code: grpc.StatusCode, message: str, trailers: Any) -> Refusal:
    """The refusal in a gRPC status and its trailing metadata."""
    refusal = Refusal(code.name, message, code.name)
    for detail in details_of(trailers):
        _add(refusal, detail)
    return refusal


def of(error: LoraplexError, request_id: str = "") -> Refusal:
    """The refusal that an error of ours is."""
    return read(code_of(error), error.message, trailers_of(error, request_id))


def wrong(param: str, problem: str) -> Refused:
    """A field of the HTTP request is wrong."""
    return Refused(of(InvalidRequest(param, problem)))


def _add(refusal: Refusal, detail: Any) -> None:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    if detail.Unpack(info):
        refusal.reason = info.reason
        refusal.fix = info.metadata.get("fix", "")
        refusal.request_id = info.metadata.get("request_id", "")
    elif detail.Unpack(bad):
        refusal.violations = [(one.field, one.description) for one in bad.field_violations]
    elif detail.Unpack(retry):
        refusal.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
