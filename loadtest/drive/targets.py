"""What a tape is sent to. The hot path stores arrival times and bytes; messages are taken apart when a stream has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client.credentials import Credentials
from engine.client.errors import from_rpc
from engine.client.requests import generate_request
from loadtest.drive.records import Record, Status

_STREAMS_PER_CHANNEL = 50  # a stream past the connection's limit (often 100) would wait in the client, unseen
_METHOD = "/loraplex.v1.GenerationService/GenerateStream"
_MOST_BYTES = 64 * 1024 * 1024
_NONE = Credentials()


@dataclass(frozen=True)
class Question:
    """A request as it will be sent."""

    adapter: str
    prompt: str
    max_tokens: int


class Target(Protocol):
    """A server of some protocol. Nothing that it does raises: whatever happens is written into the record."""

    def message(self, question: Question) -> Any:
        """The request, ready to be sent, so that building it costs nothing at its time."""
        ...

    async def ask(self, message: Any, record: Record, cancel_after: int) -> None:
        """Send it, write down what comes; give up on purpose after `cancel_after` messages (0: never)."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


@dataclass(frozen=True)
class TargetSpec:
    """How a client process makes its target: gRPC addresses, or the URL of an OpenAI server."""

    addresses: tuple[str, ...]
    timeout_s: float
    protocol: str = "loraplex"
    model: str = ""
    credentials: Credentials = _NONE

    def open(self) -> Target:
        """Connect; needs a running event loop."""
        if self.protocol == "openai":
            from loadtest.drive.openai import OpenAITarget

            return OpenAITarget(self.addresses[0], self.model, self.timeout_s)
        return LoraplexTarget(self.addresses, self.timeout_s, self.credentials)


class LoraplexTarget:
    """GenerateStream over gRPC, without retries: a refusal is a result."""

    def __init__(self, addresses: tuple[str, ...], timeout_s: float, credentials: Credentials = _NONE) -> None:
        self._addresses = addresses
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._channels: list[_Channel] = []
        self._turn = 0

    def message(self, question: Question) -> bytes:
        """The serialized request: greedy, and exactly `max_tokens` long."""
        request = generate_request(
            {
                "adapter": question.adapter,
                "prompt": question.prompt,
                "max_tokens": question.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
        )
        return pb.GenerateStreamRequest(request=request).SerializeToString()

    async def ask(self, message: bytes, record: Record, cancel_after: int) -> None:
        """Send it and write down what comes."""
        channel = self._channel()
        channel.streams += 1
        raw: list[bytes] = []
        arrivals: list[float] = []
        clock = time.monotonic
        record.sent = clock()
        call = channel.method(message, timeout=self._timeout_s, metadata=channel.metadata)
        try:
            async for data in call:
                arrivals.append(clock())
                raw.append(data)
                if len(raw) == cancel_after:
                    record.status = Status.CANCELLED
                    break
            else:
                record.status = Status.OK
        except grpc.RpcError as error:
            _failed(record, error)
        finally:
            record.ended = clock()
            channel.streams -= 1
            call.cancel()
            decode(record, raw, arrivals)

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels:
            await channel.channel.close()

    def _channel(self) -> _Channel:
        address = self._addresses[self._turn % len(self._addresses)]
        self._turn += 1
        mine = [one for one in self._channels if one.address == address and one.streams < _STREAMS_PER_CHANNEL]
        if mine:
            return min(mine, key=lambda one: one.streams)
        self._channels.append(_Channel(address, self._credentials))
        return self._channels[-1]


class _Channel:
    """A connection of its own: gRPC would otherwise share one among channels to the same address."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self.address = address
        self.streams = 0
        self.metadata = credentials.metadata(address)
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", _MOST_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        tls = credentials.channel()
        self.channel = (
            grpc.aio.secure_channel(address, tls, options) if tls else grpc.aio.insecure_channel(address, options)
        )
        self.method: Any = self.channel.unary_stream(_METHOD)  # bytes in, bytes out


def _failed(record: Record, error: grpc.RpcError) -> None:
    translated = from_rpc(error)
    timed_out = translated.code is grpc.StatusCode.DEADLINE_EXCEEDED
    record.status = Status.TIMEOUT if timed_out else Status.ERROR
    record.reason = translated.reason if translated.reason != "UNKNOWN" else f"UNKNOWN: {translated.message[:80]}"


def decode(record: Record, raw: list[bytes], arrivals: list[float]) -> None:
    """Take the messages of a stream apart: tokens, numbering, who answered, the server's counts."""
    seen: set[int] = set()
    token_ids: list[int] = []
    highest = -1
    for at, data in zip(arrivals, raw, strict=True):
        message = pb.GenerateStreamResponse.FromString(data)
        if message.sequence in seen:
            record.duplicated += max(1, len(message.token_ids))
            continue
        record.reordered += message.sequence < highest
        seen.add(message.sequence)
        highest = max(highest, message.sequence)
        if message.token_ids:
            record.times.append(at)
            record.counts.append(len(message.token_ids))
            token_ids.extend(message.token_ids)
        _identity(record, message)
    record.lost = highest + 1 - len(seen)
    if record.canary >= 0:
        record.token_ids = tuple(token_ids)


def _identity(record: Record, message: pb.GenerateStreamResponse) -> None:
    if message.HasField("adapter"):
        who = f"{message.adapter.name}@{message.adapter.version}" if message.adapter.name else ""
        if message.sequence == 0:
            record.answered_by, record.digest = who, message.adapter.digest
        elif who != record.answered_by:
            record.switched = who or "base"
    if message.HasField("usage"):
        record.complete = True
        record.prompt_tokens = message.usage.prompt_tokens
        record.claimed_tokens = message.usage.completion_tokens
        record.queue_s = message.timings.queue.ToMicroseconds() / 1e6
        record.adapter_wait_s = message.timings.adapter_wait.ToMicroseconds() / 1e6
        record.server_ttft_s = message.timings.time_to_first_token.ToMicroseconds() / 1e6
