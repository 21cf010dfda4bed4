"""The client processes. Each has its own event loop and connections, so that one core's worth of Python is not the limit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import uvloop

from loadtest.drive.driver import Driver, Emit, Job
from loadtest.drive.records import Beat, Record
from loadtest.drive.targets import TargetSpec
from loadtest.errors import ClientBroken

_POLL_S = 0.05
_START_S = 60.0
_LEAD_S = 0.3  # between the word "go" and the first request, so that all processes start together


Started = Callable[[float], None]


async def drive(job: Job, spec: TargetSpec, emit: Emit, workers: int, started: Started) -> None:
    """Send the tape with `workers` processes (0: in this one); `started` is told the start, by time.monotonic.

    Raises ClientBroken when a process dies. Cancelling it stops the load; what was measured has been emitted.
    """
    if workers == 0:
        await _here(job, spec, emit, started)
        return
    crew = [_Worker.start(replace(job, worker=number, workers=workers), spec) for number in range(workers)]
    try:
        for worker in crew:
            await worker.expect_ready()
        start = time.monotonic() + _LEAD_S
        started(start)
        for worker in crew:
            worker.connection.send(start)
        try:
            await asyncio.gather(*(worker.pump(emit) for worker in crew))
        except asyncio.CancelledError:
            for worker in crew:
                with contextlib.suppress(OSError):
                    worker.connection.send("stop")
            await asyncio.gather(*(worker.pump(emit) for worker in crew), return_exceptions=True)
            raise
    finally:
        for worker in crew:
            worker.end()


async def _here(job: Job, spec: TargetSpec, emit: Emit, started: Started) -> None:
    async with _opened(spec) as target:
        driver = Driver(job, target, emit)
        driver.prepare()
        start = time.monotonic() + 0.02
        started(start)
        await driver.run(start)


@contextlib.asynccontextmanager
async def _opened(spec: TargetSpec) -> AsyncIterator[Any]:
    target = spec.open()
    try:
        yield target
    finally:
        await target.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    finished: bool = False

    @classmethod
    def start(cls, job: Job, spec: TargetSpec) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(theirs, job, spec), name=f"client-{job.worker}", daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    async def expect_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self.connection.poll():
            if not self.process.is_alive() or time.monotonic() > deadline:
                raise ClientBroken(f"{self.process.name} did not start (exit code {self.process.exitcode})")
            await asyncio.sleep(_POLL_S)
        self.connection.recv()

    async def pump(self, emit: Emit) -> None:
        """Hand on what the process sends until it says that it has finished."""
        while not self.finished:
            while self.connection.poll():
                try:
                    message: tuple[list[Record], Beat] | None = self.connection.recv()
                except EOFError:
                    raise ClientBroken(f"{self.process.name} died during the run") from None
                if message is None:
                    self.finished = True
                    return
                emit(*message)
            if not self.process.is_alive() and not self.connection.poll():
                raise ClientBroken(f"{self.process.name} died during the run (exit code {self.process.exitcode})")
            await asyncio.sleep(_POLL_S)

    def end(self) -> None:
        self.connection.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _main(connection: Connection, job: Job, spec: TargetSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(connection, job, spec))


async def _work(connection: Connection, job: Job, spec: TargetSpec) -> None:
    outbox: asyncio.Queue[tuple[list[Record], Beat] | None] = asyncio.Queue()
    async with _opened(spec) as target:
        driver = Driver(job, target, lambda records, beat: outbox.put_nowait((records, beat)))
        driver.prepare()
        gc.collect()
        gc.freeze()
        connection.send("ready")
        start: float = await asyncio.to_thread(connection.recv)
        work = asyncio.create_task(driver.run(start))
        post = asyncio.create_task(_post(outbox, connection))
        while not work.done():
            await asyncio.wait([work], timeout=_POLL_S)
            if connection.poll():
                work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        outbox.put_nowait(None)
        await post


async def _post(outbox: asyncio.Queue[tuple[list[Record], Beat] | None], connection: Connection) -> None:
    """Send from a thread: a parent that is busy must not hold up the load."""
    while True:
        message = await outbox.get()
        await asyncio.to_thread(connection.send, message)
        if message is None:
            return
