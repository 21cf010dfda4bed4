"""What a running server holds and uses: memory, files and time of its processes, requests and slots by its own account."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import psutil

from engine.client import AsyncClient

_MIB = 1024 * 1024
_EVERY_S = 1.0


@dataclass(frozen=True)
class Vitals:
    """One look: at seconds since the first one, memory (MiB, without pages that processes share) and open files."""

    at: float
    memory_mib: float
    files: int


def look(process: psutil.Process, since: float) -> Vitals:
    """The server's processes, all of them."""
    memory, files = 0, 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            told = one.memory_info()
            memory += told.rss - getattr(told, "shared", 0)
            files += one.num_fds()
    return Vitals(time.monotonic() - since, memory / _MIB, files)


@dataclass
class Cores:
    """Processor seconds a second over the time of a block: of these callers, the server's own process, and the engine's."""

    callers: float = 0.0
    server: float = 0.0
    engine: float = 0.0


@contextlib.contextmanager
def cores(process: psutil.Process) -> Iterator[Cores]:
    """Measure while the block runs; the result is complete after it."""
    used, before, began = Cores(), _processor_s(process), time.monotonic()
    yield used
    after, seconds = _processor_s(process), time.monotonic() - began
    used.callers, used.server, used.engine = ((b - a) / seconds for a, b in zip(before, after, strict=True))


def _processor_s(process: psutil.Process) -> tuple[float, float, float]:
    times = [one.cpu_times() for one in (psutil.Process(), process, *process.children(recursive=True))]
    callers, server, *rest = (told.user + told.system for told in times)
    return callers, server, sum(rest)


@contextlib.asynccontextmanager
async def watched(process: psutil.Process) -> AsyncIterator[list[Vitals]]:
    """Look every second for the time of the block."""
    seen: list[Vitals] = []
    since = time.monotonic()

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(look, process, since))
            await asyncio.sleep(_EVERY_S)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def slope_mib_per_h(seen: Sequence[Vitals], skip: float = 0.3) -> float:
    """How fast memory grows: a line through what was seen, without the first part, in which caches fill."""
    kept = seen[int(len(seen) * skip) :]
    if len(kept) < 2:
        return 0.0
    return statistics.linear_regression([one.at for one in kept], [one.memory_mib for one in kept]).slope * 3600


async def left_over(client: AsyncClient, patience_s: float = 10.0) -> dict[str, float]:
    """What is still running, waiting, or in the key-value cache once all is quiet."""
    until = time.monotonic() + patience_s
    while True:
        load = (await client.engine()).load
        left = {"running": load.running, "waiting": load.waiting}
        if not any(left.values()) or time.monotonic() > until:
            return left | {"kv_cache_usage": round(load.kv_cache_usage, 4)}
        await asyncio.sleep(0.2)
