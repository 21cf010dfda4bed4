"""GenerateStream: nothing missing, nothing repeated, and nothing left running."""

# ruff: noqa: N802 - servicers have the names of the proto's methods

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.api.loraplex.v1 import generation_pb2_grpc as services
from engine.client import RequestError, StreamBroken, Unavailable, Usage

DONE = {"finish_reason": pb.FINISH_REASON_LENGTH, "usage": pb.Usage(completion_tokens=3), "timings": pb.Timings()}
WHO = {"adapter": pb.ResolvedAdapter(name="support", version="v1"), "request_id": "r-1"}


def message(sequence: int, **fields) -> pb.GenerateStreamResponse:
    """One message of a stream; the first one says who answers."""
    return pb.GenerateStreamResponse(
        sequence=sequence, text=f"{sequence} ", token_ids=[sequence], **(WHO if sequence == 0 else {}), **fields
    )


class Script(services.GenerationServiceServicer):
    """Sends the messages, then ends, fails as UNAVAILABLE or (`endless`) waits to be cancelled."""

    def __init__(self, *messages, fail: bool = False, endless: bool = False, refusals: int = 0) -> None:
        self.messages = messages
        self.fail = fail
        self.endless = endless
        self.refusals = refusals
        self.calls = 0
        self.released = asyncio.Event()

    async def GenerateStream(self, request, context):
        self.calls += 1
        if self.calls <= self.refusals:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        try:
            for one in self.messages:
                yield one
            if self.endless:
                await asyncio.Event().wait()
            if self.fail:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "died")
        finally:
            self.released.set()


async def test_chunks_come_in_order(connect):
    """Chunks are numbered from 0; each knows who answers, and the last one has usage and timings."""
    client = await connect(Script(message(0), message(1), message(2, **DONE)))
    chunks = [chunk async for chunk in client.stream(adapter="support", prompt="x")]
    assert "".join(chunk.text for chunk in chunks) == "0 1 2 "
    assert [chunk.sequence for chunk in chunks] == [0, 1, 2]
    assert {str(chunk.adapter) for chunk in chunks} == {"support@v1"}
    assert {chunk.request_id for chunk in chunks} == {"r-1"}
    assert [chunk.finish_reason for chunk in chunks] == ["", "", "length"]
    assert [chunk.usage for chunk in chunks] == [None, None, Usage(0, 0, 3)]
    assert chunks[2].timings is not None


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ((message(0), message(2, **DONE)), "message 2 came instead of 1"),
        ((message(0), message(0), message(1, **DONE)), "message 0 came instead of 1"),
        ((message(0), message(1)), "ended after 2 messages"),
        ((), "ended after 0 messages"),
        ((message(0, **DONE), message(1)), "message 1 came instead of the end"),
    ],
    ids=["gap", "repeat", "no last message", "nothing", "more after the end"],
)
async def test_incomplete_streams_are_broken(connect, messages, why):
    """A stream with a gap, a repetition or without its last message never looks like a whole answer."""
    client = await connect(Script(*messages))
    with pytest.raises(StreamBroken, match=why) as caught:
        async for _ in client.stream(prompt="x"):
            pass
    assert caught.value.reason == "STREAM_BROKEN"
    assert caught.value.request_id == ("r-1" if messages else "")


async def test_refused_streams_are_tried_again(connect):
    """A stream that is refused before its first message is retried."""
    script = Script(message(0, **DONE), refusals=1)
    client = await connect(script)
    assert [chunk.text async for chunk in client.stream(prompt="x")] == ["0 "]
    assert script.calls == 2


async def test_no_retry_after_a_token(connect):
    """A stream that fails after a token is Unavailable, with that token delivered once and one call made."""
    script = Script(message(0), fail=True)
    client = await connect(script)
    stream = client.stream(prompt="x")
    assert (await anext(stream)).text == "0 "
    with pytest.raises(Unavailable, match="died"):
        await anext(stream)
    await asyncio.sleep(0.3)  # longer than the first backoff
    assert script.calls == 1


async def test_leaving_the_loop_cancels_the_request(connect):
    """A break, an aclose and a cancelled task each free the server."""

    async def leave_by_break():
        async for _ in client.stream(prompt="x"):
            break

    async def leave_by_aclose():
        async with aclosing(client.stream(prompt="x")) as stream:
            await anext(stream)

    async def leave_by_cancel():
        async def read():
            async for _ in client.stream(prompt="x"):
                begun.set()

        begun = asyncio.Event()
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for leave in (leave_by_break, leave_by_aclose, leave_by_cancel):
        script = Script(message(0), endless=True)
        client = await connect(script)
        await leave()
        await asyncio.wait_for(script.released.wait(), 2)


async def test_closing_the_client_ends_its_streams(connect):
    """A stream whose client is closed fails as CANCELLED instead of cancelling the task that reads it."""
    client = await connect(Script(message(0), endless=True))
    stream = client.stream(prompt="x")
    await anext(stream)
    await client.close()
    with pytest.raises(RequestError, match="closed") as caught:
        await anext(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED
