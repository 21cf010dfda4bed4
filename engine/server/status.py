"""Our errors as gRPC statuses with google.rpc details, and the details of a status that came back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from engine.errors import (
    AdapterNotFound,
    EngineDied,
    InvalidAdapter,
    InvalidRequest,
    LoraplexError,
    NotFinite,
    OtherVersion,
    Quarantined,
    QuotaExceeded,
    StreamLost,
    Unavailable,
    VersionExists,
    WrongBase,
)

DOMAIN = "loraplex"
_DETAILS_KEY = "grpc-status-details-bin"  # where gRPC's richer error model puts google.rpc.Status
_PUSHBACK_KEY = "grpc-retry-pushback-ms"  # tells gRPC's own retries how long to wait (gRFC A6)
_LONGEST_MESSAGE = 2000  # characters: status and details travel in trailers, which are limited to a few KiB


def code_of(error: LoraplexError) -> grpc.StatusCode:
    """The gRPC status code of an error."""
    return grpc.StatusCode[error.status]


def trailers_of(error: LoraplexError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata: the google.rpc.Status, and a retry pushback for what may be tried again."""
    code: int = code_of(error).value[0]
    status = status_pb2.Status(code=code, message=message_of(error))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata["request_id"] = request_id
    if error.fix:
        info.metadata["fix"] = error.fix
    if isinstance(error, WrongBase):
        info.metadata["trained_on"] = error.trained_on
        info.metadata["served"] = error.served
    if isinstance(error, EngineDied | StreamLost):
        info.metadata["tokens_sent"] = str(error.tokens_sent)
    for detail in (info, *_details(error)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailers: list[tuple[str, str | bytes]] = [(_DETAILS_KEY, status.SerializeToString())]
    if isinstance(error, Unavailable):
        trailers.append((_PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
    return tuple(trailers)


def details_of(trailers: Any) -> Iterator[any_pb2.Any]:
    """The packed google.rpc details in trailing metadata, or in none; nothing if it has no google.rpc.Status."""
    for key, value in trailers or ():
        if key == _DETAILS_KEY:
            yield from status_pb2.Status.FromString(value).details


def message_of(error: LoraplexError) -> str:
    """The error's message, cut to what trailers can carry."""
    return error.message[:_LONGEST_MESSAGE]


def _details(error: LoraplexError) -> list[message.Message]:
    match error:
        case InvalidRequest():
            fields = [
                error_details_pb2.BadRequest.FieldViolation(field=field, description=problem[:500])
                for field, problem in error.violations[:20]
            ]
            return [error_details_pb2.BadRequest(field_violations=fields)]
        case InvalidAdapter():
            field = error_details_pb2.BadRequest.FieldViolation(
                field=error.where[:200], description=error.message[:500], reason=error.check.upper()
            )
            return [error_details_pb2.BadRequest(field_violations=[field])]
        case AdapterNotFound():
            nearest = ", ".join(error.nearest)
            return [
                error_details_pb2.ResourceInfo(resource_type=error.kind, resource_name=error.ref, description=nearest)
            ]
        case VersionExists() | WrongBase() | OtherVersion() | NotFinite() | Quarantined():
            return [error_details_pb2.ResourceInfo(resource_type="version", resource_name=error.ref)]
        case QuotaExceeded():
            violation = error_details_pb2.QuotaFailure.Violation(subject=error.tenant, description=error.message)
            return [error_details_pb2.QuotaFailure(violations=[violation]), _retry(error.retry_after_s)]
        case Unavailable():
            return [_retry(error.retry_after_s)]
        case _:
            return []


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)
