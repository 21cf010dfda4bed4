"""What a failed call raises.

    RequestError
    ├── the request has to change
    │   ├── InvalidArgument       a field is wrong: see `violations`
    │   ├── NotFound              no such adapter, version or alias
    │   ├── AlreadyExists         the version is published already, with other bytes
    │   ├── Aborted               somebody else moved the alias first
    │   ├── FailedPrecondition    not in this state, or trained on another base model
    │   ├── PermissionDenied      not for this caller
    │   ├── Unauthenticated       no credentials, or wrong ones
    │   └── ResourceExhausted     more than this caller may have
    ├── the same request may be tried again
    │   ├── Unavailable           full, draining, loading or gone: wait `retry_after_s`
    │   ├── DeadlineExceeded      `timeout_s` passed before the answer was there
    │   └── StreamBroken          a stream lost messages; the text so far is incomplete
    └── the operator has to look
        ├── DataLoss              a stored adapter is damaged
        └── Internal              a bug of the server: report `request_id`

A code without a class of its own is a plain RequestError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError

_DETAILS = "grpc-status-details-bin"


class RequestError(Exception):
    """A call failed; `code` and `reason` are for programs, `message` and `fix` for people."""

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str = "", code: grpc.StatusCode | None = None) -> None:
        super().__init__(message)
        self.message = message
        """What went wrong."""
        self.code: grpc.StatusCode = code or self.default_code
        """The gRPC status code."""
        self.reason: str = self.code.name
        """A stable name of the cause, such as "ADAPTER_NOT_FOUND"; the status code's name if the server gave none."""
        self.fix = ""
        """What to do about it, in a sentence; may be empty."""
        self.violations: list[tuple[str, str]] = []
        """For InvalidArgument: (field path, what is wrong with it)."""
        self.resource = ""
        """What the error is about, such as the adapter reference that was not found; may be empty."""
        self.retry_after_s: float | None = None
        """Seconds that the server asks to wait before the next try; None if it said nothing."""
        self.request_id = ""
        """The request's id in the server's log, if known."""

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


class NotFound(RequestError):
    """No such adapter, version or alias."""

    default_code = grpc.StatusCode.NOT_FOUND


class InvalidArgument(RequestError):
    """A field of the request, or an uploaded adapter, is wrong."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPrecondition(RequestError):
    """The state of the server forbids it, or the adapter was trained on another base model."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class AlreadyExists(RequestError):
    """The version is published already, with other bytes."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class Aborted(RequestError):
    """Somebody else moved the alias first."""

    default_code = grpc.StatusCode.ABORTED


class Unavailable(RequestError):
    """The server is full, draining, loading or gone; the same request may be tried again."""

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(RequestError):
    """The call's `timeout_s` passed before the work was done."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class ResourceExhausted(RequestError):
    """More than this caller may have at once, or a message above the size limit."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DataLoss(RequestError):
    """Stored bytes of an adapter do not match their digest."""

    default_code = grpc.StatusCode.DATA_LOSS


class PermissionDenied(RequestError):
    """Not for this caller."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(RequestError):
    """No credentials, or wrong ones."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class Internal(RequestError):
    """A bug of the server; its log has more under `request_id`."""

    default_code = grpc.StatusCode.INTERNAL


class StreamBroken(RequestError):
    """A stream ended without its last message, or messages are missing in it."""

    default_code = grpc.StatusCode.INTERNAL

    def __init__(self, message: str = "", code: grpc.StatusCode | None = None) -> None:
        super().__init__(message, code)
        self.reason = "STREAM_BROKEN"


_BY_CODE = {
    kind.default_code: kind
    for kind in (
        NotFound,
        InvalidArgument,
        FailedPrecondition,
        AlreadyExists,
        Aborted,
        Unavailable,
        DeadlineExceeded,
        ResourceExhausted,
        DataLoss,
        PermissionDenied,
        Unauthenticated,
        Internal,
    )
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise the gRPC errors of the block as RequestErrors."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled this task: its call was cancelled, because the channel was closed.
        raise RequestError("the client was closed during the call", grpc.StatusCode.CANCELLED) from None


def from_rpc(error: grpc.RpcError) -> RequestError:
    """The RequestError for a gRPC error, with the server's google.rpc details if it sent any."""
    code = error.code()
    result = _BY_CODE.get(code, RequestError)(error.details() or code.name, code)
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == _DETAILS and isinstance(value, bytes):
            _add_details(result, value)
    return result


def _add_details(error: RequestError, status: bytes) -> None:
    try:
        from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped,unused-ignore]
    except ImportError:  # googleapis-common-protos is optional: code and message have to do
        return
    try:
        details = status_pb2.Status.FromString(status).details
        info, bad, resource, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.ResourceInfo(),
            error_details_pb2.RetryInfo(),
        )
        for detail in details:
            if detail.Unpack(info):
                error.reason = info.reason
                error.fix = info.metadata.get("fix", "")
                error.request_id = info.metadata.get("request_id", "")
            elif detail.Unpack(bad):
                error.violations += [(found.field, found.description) for found in bad.field_violations]
            elif detail.Unpack(resource):
                error.resource = resource.resource_name
            elif detail.Unpack(retry):
                error.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    except DecodeError:
        return
