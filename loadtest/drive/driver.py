"""Sends the rows of a tape that fall to one process, open loop or closed loop, on this process's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadtest.drive.records import Beat, Record, Status
from loadtest.drive.targets import Question, Target
from loadtest.plan.prompts import prompt_of_row
from loadtest.plan.tape import Tape

Emit = Callable[[list[Record], Beat], None]

_BEAT_S = 0.2
_TICK_S = 0.02


@dataclass(frozen=True)
class Job:
    """What one of `workers` processes has to do: every `workers`-th row of the tape, from the `worker`-th on."""

    tape: Tape
    canary_prompts: tuple[str, ...]
    seed: int
    duration_s: float
    drain_s: float
    max_inflight: int
    worker: int = 0
    workers: int = 1

    @property
    def rows(self) -> range:
        """The rows of this process."""
        return range(self.worker, len(self.tape), self.workers)

    def question(self, row: int) -> Question:
        """What a row asks."""
        canary = int(self.tape.canary[row])
        if canary >= 0:
            prompt = self.canary_prompts[canary]
        else:
            prompt = prompt_of_row(self.seed, row, int(self.tape.prompt_tokens[row]))
        return Question(self.tape.name(row), prompt, int(self.tape.max_tokens[row]))


class Driver:
    """Runs a job. Every row that was due by the end has a record, whatever became of it."""

    def __init__(self, job: Job, target: Target, emit: Emit) -> None:
        self._job = job
        self._target = target
        self._emit = emit
        self._done: list[Record] = []
        self._under_way: dict[asyncio.Task[None], Record] = {}
        self._lags: list[float] = []
        self._sent = 0
        self._messages: list[Any] = []

    def prepare(self) -> None:
        """Build the messages of an open loop beforehand."""
        if not self._job.tape.callers:
            self._messages = [self._target.message(self._job.question(row)) for row in self._job.rows]

    async def run(self, start: float) -> None:
        """Send everything from `start` (time.monotonic) on; cancelling it ends it early, with all records emitted."""
        watch = [asyncio.create_task(self._beat()), asyncio.create_task(self._tick())]
        try:
            if self._job.tape.callers:
                await self._closed(start)
            else:
                await self._open(start)
            await self._drain(start + self._job.duration_s + self._job.drain_s)
        finally:
            for task in (*watch, *self._under_way):
                task.cancel()
            await asyncio.gather(*watch, *self._under_way, return_exceptions=True)
            self._flush(0.0)

    async def _open(self, start: float) -> None:
        at = self._job.tape.at
        for number, row in enumerate(self._job.rows):
            due = start + float(at[row])
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            self._send(row, due, self._messages[number])
        await asyncio.sleep(max(0.0, start + self._job.duration_s - time.monotonic()))

    async def _closed(self, start: float) -> None:
        rows = iter(self._job.rows)
        job = self._job
        callers = len(range(job.worker, job.tape.callers, job.workers))
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        # A slow start: all callers at once would measure their own collision.
        spread = min(1.0, job.duration_s / 10) / max(callers, 1)
        await asyncio.gather(*(self._caller(rows, start + spread * n, start + job.duration_s) for n in range(callers)))

    async def _caller(self, rows: Any, due: float, end: float) -> None:
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            row = next(rows, None)
            if row is None:
                return
            task = self._send(row, due, self._target.message(self._job.question(row)))
            if task:
                await asyncio.wait([task], timeout=max(0.0, end + self._job.drain_s - time.monotonic()))
            due = time.monotonic() + self._job.tape.think_s

    def _send(self, row: int, due: float, message: Any) -> asyncio.Task[None] | None:
        tape = self._job.tape
        record = Record(row, tape.name(row), due, int(tape.canary[row]), int(tape.max_tokens[row]))
        if len(self._under_way) >= self._job.max_inflight:
            record.sent = record.ended = time.monotonic()
            record.status = Status.DROPPED
            self._done.append(record)
            return None
        self._sent += 1
        task = asyncio.create_task(self._target.ask(message, record, int(tape.cancel_after[row])))
        self._under_way[task] = record
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        record = self._under_way.pop(task)
        if task.cancelled():
            record.ended = record.ended or time.monotonic()
        elif error := task.exception():
            record.status, record.reason = Status.ERROR, f"client: {type(error).__name__}: {error}"
            record.ended = record.ended or time.monotonic()
        self._done.append(record)

    async def _drain(self, until: float) -> None:
        while self._under_way and (left := until - time.monotonic()) > 0:
            await asyncio.wait(list(self._under_way), timeout=left)

    async def _beat(self) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        while True:
            await asyncio.sleep(_BEAT_S)
            now, used = time.monotonic(), time.process_time()
            self._flush((used - cpu) / (now - wall))
            wall, cpu = now, used

    async def _tick(self) -> None:
        while True:
            due = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._lags.append(time.monotonic() - due)

    def _flush(self, cpu: float) -> None:
        beat = Beat(self._job.worker, time.monotonic(), self._sent, len(self._under_way), cpu, self._lags)
        done, self._done, self._lags = self._done, [], []
        self._emit(done, beat)
