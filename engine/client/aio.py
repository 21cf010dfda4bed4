"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from engine.api.loraplex.v1 import engine_pb2, generation_pb2
from engine.client.adapters import Adapters
from engine.client.channel import MEBIBYTE, Wire
from engine.client.credentials import Credentials, authorization
from engine.client.errors import DeadlineExceeded, StreamBroken, Unavailable, translated
from engine.client.requests import GenerateOptions, Messages, count_tokens_request, generate_request
from engine.client.results import Chunk, Generation, TokenCount, adapter, chunk, generation, token_count
from engine.client.tracing import Metadata

_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse{status: SERVING}
_POLL_S = 0.1


class AsyncClient:
    """A client for asyncio. One serves any number of calls at once; make it where an event loop runs.

    `target` is host:port or any gRPC name. `timeout_s` is the deadline of each call, in seconds (math.inf: none).
    `credentials` turn TLS on; `api_key` is a key or token that says who calls, sent to other machines by TLS only (else
    Unauthenticated); `metadata` is sent with every call; `max_message_bytes` bounds a message either way.
    A call that is refused as UNAVAILABLE is tried again up to `retries` times (at most 4) within its deadline, but
    never once the server has begun to answer; of `adapters`, only the calls that do no harm when done twice.

    Every failed call raises a RequestError.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
        metadata: Metadata = (),
        max_message_bytes: int = 64 * MEBIBYTE,
        retries: int = 4,
    ) -> None:
        self.target = target
        metadata = (*metadata, *authorization(api_key, target, encrypted=credentials is not None))
        self._wire = Wire(target, timeout_s, credentials, metadata, max_message_bytes, retries)
        self.adapters = Adapters(self._wire)
        """Publishes adapters and decides which version answers."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight fail as CANCELLED."""
        await self._wire.close()

    async def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """Answer a prompt with the whole text at once; GenerateOptions and Sampling explain the keywords.

        Cancelling the task cancels the request on the server.
        """
        request = generate_request(options)
        response = await self._wire.unary(
            "GenerationService/Generate", request, generation_pb2.GenerateResponse, options.get("timeout_s")
        )
        return generation(response)

    def stream(self, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """Answer a prompt token by token, with the same keywords as `generate`.

        Raises StreamBroken if messages are missing, the last one included. Leaving the loop cancels the request; to be
        sure when, hold the stream in `contextlib.aclosing`.
        """
        return self._chunks(generate_request(options), options.get("timeout_s"))

    async def _chunks(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        call = self._wire.stream(
            "GenerationService/GenerateStream",
            generation_pb2.GenerateStreamRequest(request=request),
            generation_pb2.GenerateStreamResponse,
            timeout_s,
        )
        expected, complete, request_id = 0, False, ""
        try:
            with translated():
                async for message in call:
                    if message.sequence != expected or complete:
                        lost = f"message {message.sequence} came instead of " + (
                            "the end" if complete else f"{expected}"
                        )
                        raise _broken(lost, request_id)
                    if expected == 0:
                        who, request_id = adapter(message.adapter), message.request_id
                    expected, complete = expected + 1, message.HasField("usage")
                    yield chunk(message, who, request_id)
            if not complete:
                raise _broken(f"it ended after {expected} messages, without the last one", request_id)
        finally:
            call.cancel()

    async def count_tokens(
        self, prompt: str | None = None, *, messages: Messages | None = None, timeout_s: float | None = None
    ) -> TokenCount:
        """Count the tokens that a text or a conversation becomes, without generating anything."""
        request = count_tokens_request(prompt, messages)
        response = await self._wire.unary(
            "GenerationService/CountTokens", request, generation_pb2.CountTokensResponse, timeout_s
        )
        return token_count(response)

    async def engine(self, *, timeout_s: float | None = None) -> engine_pb2.GetEngineResponse:
        """What the server serves, within which limits, and how busy it is."""
        return await self._wire.unary(
            "EngineService/GetEngine", engine_pb2.GetEngineRequest(), engine_pb2.GetEngineResponse, timeout_s
        )

    async def activity(self, *, timeout_s: float | None = None) -> engine_pb2.GetActivityResponse:
        """Who is being served, and how well; counters run from the server's start."""
        return await self._wire.unary(
            "EngineService/GetActivity", engine_pb2.GetActivityRequest(), engine_pb2.GetActivityResponse, timeout_s
        )

    async def caller(self, *, timeout_s: float | None = None) -> engine_pb2.GetCallerResponse:
        """Whom the server takes you for, and your roles there."""
        return await self._wire.unary(
            "EngineService/GetCaller", engine_pb2.GetCallerRequest(), engine_pb2.GetCallerResponse, timeout_s
        )

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server's health is SERVING; DeadlineExceeded if it is not within `timeout_s` seconds."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        check = self._wire.channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        state = "no answer"
        while (left := deadline - clock()) > 0:
            try:
                with translated():
                    reply = await check(b"", timeout=left, wait_for_ready=True)
                if reply == _SERVING:
                    return
                state = "not serving yet"
            except (Unavailable, DeadlineExceeded) as error:
                state = state if isinstance(error, DeadlineExceeded) else error.message
            await asyncio.sleep(min(_POLL_S, max(0.0, deadline - clock())))
        raise DeadlineExceeded(f"{self.target} was not ready within {timeout_s:g} s: {state}")


def connect(target: str, **options: Any) -> AsyncClient:
    """A client with the credentials that the environment names, as the command line and the load test use it."""
    found = Credentials.from_environment()
    return AsyncClient(target, credentials=found.channel(), api_key=found.api_key, **options)


def _broken(why: str, request_id: str) -> StreamBroken:
    error = StreamBroken(f"the stream is incomplete: {why}")
    error.request_id = request_id
    return error
