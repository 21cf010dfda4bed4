"""How a call to a replica ended: with an answer, or with an error for people to read or for the caller to get as it came."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeVar

from grpc import StatusCode, aio

T = TypeVar("T")


async def answer_or_error(call: Awaitable[T]) -> T | aio.AioRpcError:
    """What the replica answers, or the error that the call ends with."""
    try:
        return await call
    except aio.AioRpcError as error:
        return error


def words(error: aio.AioRpcError) -> str:
    """Code and message, for logs and for errors that tell of several replicas."""
    return f"{error.code().name}, {error.details()}"


def as_it_came(error: aio.AioRpcError) -> tuple[StatusCode, str, Any]:
    """The replica's own status, message and details: with them `context.abort` passes the error on."""
    return error.code(), error.details() or "", tuple(error.trailing_metadata() or ())
