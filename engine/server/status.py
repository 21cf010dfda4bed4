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
# Bytes. gRPC takes 8 KiB of trailers, of which the details are a third more than they were, and answers RESOURCE_EXHAUSTED
# instead of our error where there are more.
_LONGEST_MESSAGE = 1024  # percent-encoded
_LONGEST_STATUS = 4096
_LONGEST_VIOLATIONS = 2048  # all of them together
_LONGEST_FIELD = 200
_LONGEST_TEXT = 500


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
        info.metadata["fix"] = _cut(error.fix, _LONGEST_TEXT)
    if isinstance(error, WrongBase):
        info.metadata["trained_on"] = error.trained_on
        info.metadata["served"] = error.served
    if isinstance(error, EngineDied | StreamLost):
        info.metadata["tokens_sent"] = str(error.tokens_sent)
    for detail in (info, *_details(error)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        if status.ByteSize() + packed.ByteSize() < _LONGEST_STATUS:
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
    """The error's message, cut to what trailers can carry: gRPC sends a letter beyond ASCII as three for each of its bytes."""
    left = _LONGEST_MESSAGE
    for at, letter in enumerate(error.message):
        left -= 1 if " " <= letter <= "~" and letter != "%" else 3 * len(letter.encode())
        if left < 0:
            return error.message[:at]
    return error.message


def _details(error: LoraplexError) -> list[message.Message]:
    match error:
        case InvalidRequest():
            bad = error_details_pb2.BadRequest()
            for field, problem in error.violations:
                bad.field_violations.add(field=_cut(field, _LONGEST_FIELD), description=_cut(problem, _LONGEST_TEXT))
                if bad.ByteSize() > _LONGEST_VIOLATIONS:
                    del bad.field_violations[-1]
                    break
            return [bad]
        case InvalidAdapter():
            where, problem = _cut(error.where, _LONGEST_FIELD), _cut(error.message, _LONGEST_TEXT)
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field=where, description=problem, reason=error.check.upper())
            return [bad]
        case AdapterNotFound():
            nearest = ", ".join(error.nearest)
            return [
                error_details_pb2.ResourceInfo(resource_type=error.kind, resource_name=error.ref, description=nearest)
            ]
        case VersionExists() | WrongBase() | OtherVersion() | NotFinite() | Quarantined():
            return [error_details_pb2.ResourceInfo(resource_type="version", resource_name=error.ref)]
        case QuotaExceeded():
            problem = _cut(error.message, _LONGEST_TEXT)
            violation = error_details_pb2.QuotaFailure.Violation(subject=error.tenant, description=problem)
            return [error_details_pb2.QuotaFailure(violations=[violation]), _retry(error.retry_after_s)]
        case Unavailable():
            return [_retry(error.retry_after_s)]
        case _:
            return []


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _cut(text: str, most: int) -> str:
    """As much of a text as has so many bytes."""
    return text.encode()[:most].decode(errors="ignore")
