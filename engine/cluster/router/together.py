"""A stream's messages, put together while this router is busy.

A router that keeps up passes each message as it came, byte by byte. At its limit it sends fewer of them, with as many
tokens, instead of falling behind: a few milliseconds lie between two messages of a stream then, the first one aside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import NoReturn

from engine.api.loraplex.v1 import generation_pb2 as pb

_MOST = 64  # messages that may wait for a caller who reads slowly; then the replica waits, too
_LOOK_S = 0.1  # between looks at the processor time
_BUSY, _IDLE = 0.85, 0.6  # seconds of it a second, above and below which there is more and less time between messages
_LEAST_S, _LONGEST_S, _FACTOR = 0.001, 0.02, 2.0


class Pace:
    """How many seconds lie between two messages of a stream, at least: none, unless this process takes all of its core."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self._clock, self._cpu = clock, cpu
        self._looked, self._used = clock(), cpu()
        self.apart_s = 0.0

    async def watch(self) -> NoReturn:
        """Look now and then, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Adjust to how busy this process was since the last look."""
        now, used = self._clock(), self._cpu()
        busy = (used - self._used) / (now - self._looked)
        self._looked, self._used = now, used
        if busy > _BUSY:
            self.apart_s = min(_LONGEST_S, max(_LEAST_S, self.apart_s * _FACTOR))
        elif busy < _IDLE:
            self.apart_s = self.apart_s / _FACTOR if self.apart_s > _LEAST_S else 0.0


async def together(messages: AsyncGenerator[bytes, None], pace: Pace) -> AsyncGenerator[bytes, None]:
    """The same stream in at most as many messages, numbered without gaps; `messages` are closed at the end."""
    async with aclosing(messages):
        passed = 0
        async for data in messages:
            passed += 1
            yield data
            if pace.apart_s:
                break
        else:
            return
        async with aclosing(_spaced(messages, pace, passed)) as rest:
            async for data in rest:
                yield data


async def _spaced(messages: AsyncGenerator[bytes, None], pace: Pace, passed: int) -> AsyncGenerator[bytes, None]:
    """The rest of a stream after so many messages: read as they come, passed on when it is time."""
    waiting: list[bytes] = []
    came, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        async for data in messages:
            waiting.append(data)
            came.set()
            if len(waiting) >= _MOST:
                room.clear()
                await room.wait()

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: came.set())
    received = sent = passed
    last = time.monotonic()
    try:
        while waiting or not reader.done():
            if not waiting:
                came.clear()
                await came.wait()
                continue
            if not reader.done() and (early := last + pace.apart_s - time.monotonic()) > 0:
                await asyncio.sleep(early)
            batch = waiting.copy()
            waiting.clear()
            room.set()
            received += len(batch)
            for data in merged(batch) if pace.apart_s else batch:
                sent += 1
                yield data if sent == received else data + _number(sent - 1)
            last = time.monotonic()
        reader.result()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def merged(batch: list[bytes]) -> Iterator[bytes]:
    """Messages that follow each other, put together where they belong to the same one of several answers."""
    first, *rest = (pb.GenerateStreamResponse.FromString(data) for data in batch)
    for message in rest:
        if message.index != first.index:
            yield first.SerializeToString()
            first = message
            continue
        text, number = first.text + message.text, first.sequence
        first.MergeFrom(message)  # lists are joined, and whatever else the later one says counts
        first.text, first.sequence = text, number
    yield first.SerializeToString()


def _number(sequence: int) -> bytes:
    """What a message is to be followed by to have this number: protobuf takes the last value of a field."""
    return pb.GenerateStreamResponse(sequence=sequence).SerializeToString()
