"""A replica that costs next to nothing: it answers from ready-made bytes, `tokens` messages to each stream.

    python -m loadtest.bench.router.server '{}'

What a router costs before it shows in what a router adds to this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from engine.api.loraplex.v1 import engine_pb2, generation_pb2
from loadtest.bench.child import Handler, Stop, echo, serve

_BASE = "sha256:" + "0" * 64


def messages(count: int) -> list[bytes]:
    """An answer of so many one-token messages, as a server sends it."""
    made = [
        generation_pb2.GenerateStreamResponse(sequence=number, text=" word", token_ids=[number])
        for number in range(count)
    ]
    made[0].adapter.base_fingerprint = _BASE
    made[0].request_id = "0" * 32
    made[-1].finish_reason = generation_pb2.FINISH_REASON_LENGTH
    made[-1].usage.completion_tokens = count
    return [message.SerializeToString() for message in made]


class Ready(grpc.GenericRpcHandler):
    """Answers GenerateStream and GetEngine without reading or making a message."""

    def __init__(self) -> None:
        limits = engine_pb2.Limits(context_length=4096, vocabulary_size=50_000, max_running=4096, max_resident=8)
        base = engine_pb2.BaseModel(name="scripted", fingerprint=_BASE)
        self._engine = engine_pb2.GetEngineResponse(base=base, limits=limits, engine="scripted").SerializeToString()
        self._answers: dict[int, list[bytes]] = {}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of one of the two methods."""
        match handler_call_details.method:
            case "/loraplex.v1.GenerationService/GenerateStream":
                return grpc.unary_stream_rpc_method_handler(self._stream)
            case "/loraplex.v1.EngineService/GetEngine":
                return grpc.unary_unary_rpc_method_handler(self._get)
        return None

    async def _stream(self, data: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ARG002
        count = generation_pb2.GenerateStreamRequest.FromString(data).request.sampling.max_tokens
        if count not in self._answers:
            self._answers[count] = messages(count)
        for message in self._answers[count]:
            yield message

    async def _get(self, data: bytes, context: Any) -> bytes:  # noqa: ARG002
        return self._engine


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Listen on a free port, which is told."""
    del arguments
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Ready(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def stop() -> None:
        await server.stop(None)

    return {"port": port}, echo, stop


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(prepare))
