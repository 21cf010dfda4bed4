"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Each item with its stream's number, as they come. Closing this closes all; an error in one ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | int] = asyncio.Queue(maxsize=len(streams))
    tasks = [asyncio.create_task(_feed(number, stream, ready)) for number, stream in enumerate(streams)]
    try:
        going = len(tasks)
        while going:
            got = await ready.get()
            if isinstance(got, int):
                going -= 1
                await tasks[got]  # raises what ended it
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(number: int, stream: AsyncGenerator[T, None], ready: asyncio.Queue[tuple[int, T] | int]) -> None:
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await ready.put((number, item))
    finally:
        if not _cancelled():
            await ready.put(number)


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
