"""Processes that the benchmark starts: a group of its own each, a log, and, where it has a pipe, one JSON answer per question.

The process's side is `serve`. What else it or its libraries print to standard output goes to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_STOP_S = 30.0  # longest stop; then it is killed
_LINE_LIMIT = 16 * 1024 * 1024  # bytes of one answer
_TAIL = 1500  # characters of a log that explain an end
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
Stop = Callable[[], Awaitable[None]]
Prepare = Callable[[dict[str, Any]], Awaitable[tuple[dict[str, Any], Handler, Stop]]]
"""From the command line's JSON to what to say about oneself, who answers questions, and what to do at the end."""
T = TypeVar("T")


class ContenderDied(RuntimeError):
    """A process of the benchmark ended, or went silent, while it was needed; says which one and how its log ends."""

    def __init__(self, name: str, problem: str, log: Path) -> None:
        text = log.read_text(errors="replace").strip() if log.is_file() else ""
        self.name = name
        self.tail = text[-_TAIL:]
        super().__init__(f"{name} {problem}. Its log ends:\n{self.tail or '(empty)'}")


@dataclass
class Running:
    """A started process, and how long it took until it was ready (0 before it is)."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    port: int = 0
    ready_s: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self.process.pid

    @property
    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._began

    def ready(self) -> None:
        """Note that it can be asked from now on."""
        self.ready_s = self.age_s

    def died(self, problem: str) -> ContenderDied:
        """The error to raise about it."""
        return ContenderDied(self.name, problem, self.log)

    async def ask(self, question: Mapping[str, Any], timeout_s: float = 900.0) -> dict[str, Any]:
        """Send one question and wait for its answer. Raises ContenderDied."""
        if self.process.stdin is None:
            raise RuntimeError(f"{self.name} has no pipe")
        with contextlib.suppress(ConnectionError):  # it has ended: the answer will not come, and that is reported
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            await self.process.stdin.drain()
        return await self.answer(timeout_s)

    async def answer(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next line that the process says. Raises ContenderDied."""
        if self.process.stdout is None:
            raise RuntimeError(f"{self.name} has no pipe")
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        except TimeoutError as error:
            raise self.died(f"said nothing for {timeout_s:.0f} s") from error
        if not line:
            raise self.died(f"ended with exit code {await self.process.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said

    async def stop(self) -> None:
        """End it politely, then whatever it has left behind: vLLM's own processes outlive a parent that was killed."""
        try:
            if self.process.stdin is not None:
                self.process.stdin.close()  # whoever answers questions ends with them
            elif self.process.returncode is None:
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), _STOP_S)
        finally:  # also when the benchmark itself is told to end for the second time
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        await self.process.communicate()


async def start(
    name: str, command: Sequence[str], environment: Mapping[str, str], scratch: Path, *, piped: bool = True
) -> Running:
    """Start a process under this name; its log lies in `scratch`. Without a pipe it is asked in some way of its own."""
    log = scratch / f"{''.join(c if c.isalnum() else '-' for c in name)}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if piped else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if piped else errors,
            stderr=errors,
            env=os.environ | environment,
            limit=_LINE_LIMIT,
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
    return Running(name, process, log)


async def start_module(
    name: str, module: str, arguments: Mapping[str, Any], environment: Mapping[str, str], scratch: Path
) -> tuple[Running, dict[str, Any]]:
    """Start `python -m module JSON` and wait for its first line, which is returned beside it. Raises ContenderDied."""
    running = await start(name, [sys.executable, "-m", module, json.dumps(arguments)], environment, scratch)
    try:
        facts = await running.answer(timeout_s=600)
    except BaseException:
        await running.stop()
        raise
    running.ready()
    return running, facts


async def echo(question: dict[str, Any]) -> dict[str, Any]:
    """The answer of a process that is only there to be called over the network."""
    return question


async def serve(prepare: Prepare) -> None:
    """The process's side: prepare, say what came of it, then answer until the input ends."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(message: dict[str, Any]) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        facts, answer, stop = await prepare(json.loads(sys.argv[1]))
        try:
            say(facts)
            while line := await asyncio.to_thread(sys.stdin.readline):
                say(await answer(json.loads(line)))
        finally:
            await stop()


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, but a SIGTERM cancels the work as Ctrl-C does, so that what was started is ended.

    A second one changes nothing: `timeout` sends two, and ending what was started takes a while.
    """

    async def cancellable() -> T:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: task.cancelling() or task.cancel())
        return await task

    return asyncio.run(cancellable())
