"""The gRPC channel: its options, and typed calls over it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message

from engine.client import tracing
from engine.client.errors import translated
from engine.client.tracing import Metadata

MEBIBYTE = 1024 * 1024

_PACKAGE = "loraplex.v1"
# Doing these twice does no harm. RollbackAlias would go back two moves, PublishAdapter make two versions.
_REPEATABLE = {
    "GenerationService": ("Generate", "GenerateStream", "CountTokens"),
    "EngineService": ("GetEngine", "GetCaller"),
    "AdapterService": (
        "ListAdapters",
        "GetAdapter",
        "PreloadAdapter",
        "PinAdapter",
        "UnloadAdapter",
        "WatchAdapters",
    ),
}
_MOST_ATTEMPTS = 5  # gRPC itself allows no more


class _Reply(Protocol):
    @classmethod
    def FromString(cls, s: bytes) -> Self: ...  # noqa: N802 - protobuf's name


R = TypeVar("R", bound=_Reply)


def service_config(retries: int) -> str:
    """The gRPC service config: try again when the server goes away, up to `retries` times, and less so when the server is down.

    gRPC itself keeps the promise that no call is repeated once the server has begun to answer.
    """
    config: dict[str, object] = {}
    if retries:
        config["methodConfig"] = [
            {
                "name": [
                    {"service": f"{_PACKAGE}.{service}", "method": method}
                    for service, methods in _REPEATABLE.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": min(retries + 1, _MOST_ATTEMPTS),
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    # CANCELLED is what gRPC's servers make of a call that crosses with their goodbye (GOAWAY).
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ]
        config["retryThrottling"] = {"maxTokens": 10, "tokenRatio": 0.1}
    return json.dumps(config)


def _options(max_message_bytes: int, retries: int) -> list[tuple[str, str | int]]:
    return [
        ("grpc.service_config", service_config(retries)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),  # a request that may be sent may be sent again
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


class Wire:
    """Calls to one server, each with a deadline, the client's metadata and RequestErrors.

    `method` is "Service/Method" of the package loraplex.v1; `timeout_s` None means the client's deadline, inf none.
    The channel connects by the first call, and again when the connection is lost.
    """

    def __init__(
        self,
        target: str,
        timeout_s: float,
        credentials: grpc.ChannelCredentials | None,
        metadata: Metadata,
        max_message_bytes: int,
        retries: int,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._metadata = tuple(metadata)
        self._options = _options(max_message_bytes, retries)
        self._uploads: set[grpc.Channel] = set()
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(target, self._options)
        else:
            self.channel = grpc.aio.secure_channel(target, credentials, self._options)

    async def close(self) -> None:
        """Close all connections; calls in flight fail as CANCELLED."""
        for channel in self._uploads.copy():
            channel.close()
        await self.channel.close()

    async def unary(self, method: str, request: Message, reply: type[R], timeout_s: float | None = None) -> R:
        """Send one message, return the one that comes back."""
        start = self.channel.unary_unary(f"/{_PACKAGE}.{method}", _serialized, reply.FromString)
        metadata, span = tracing.begun(f"{_PACKAGE}.{method}", self._metadata)
        call = start(request, timeout=self._deadline(timeout_s), metadata=metadata)
        tracing.ends_with(call, span)
        with translated():
            return await call

    def stream(
        self, method: str, request: Message, reply: type[R], timeout_s: float | None = None
    ) -> grpc.aio.UnaryStreamCall[Message, R]:
        """Send one message; the call that is returned yields what comes back. Read it inside `translated`."""
        start = self.channel.unary_stream(f"/{_PACKAGE}.{method}", _serialized, reply.FromString)
        metadata, span = tracing.begun(f"{_PACKAGE}.{method}", self._metadata)
        call = start(request, timeout=self._deadline(timeout_s), metadata=metadata)
        tracing.ends_with(call, span)
        return call

    @asynccontextmanager
    async def upload(
        self, method: str, requests: Iterator[Message], reply: type[R], timeout_s: float | None = None
    ) -> AsyncIterator[AsyncIterator[R]]:
        """Send messages, on a connection of their own, while others come back; leaving the block ends the call.

        `requests` is iterated in another thread. This is no grpc.aio call, because those lose the status of a server
        that refuses an upload before its end: https://github.com/grpc/grpc/issues/36066.
        """
        if self._credentials is None:
            channel = grpc.insecure_channel(self.target, self._options)
        else:
            channel = grpc.secure_channel(self.target, self._credentials, self._options)
        self._uploads.add(channel)
        try:
            call = channel.stream_stream(f"/{_PACKAGE}.{method}", _serialized, reply.FromString)
            yield _replies(call(requests, timeout=self._deadline(timeout_s), metadata=self._metadata))
        finally:
            self._uploads.discard(channel)
            channel.close()

    def _deadline(self, timeout_s: float | None) -> float | None:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        return None if math.isinf(seconds) else seconds


async def _replies(call: Iterator[R]) -> AsyncIterator[R]:
    while (reply := await asyncio.to_thread(next, call, None)) is not None:
        yield reply
