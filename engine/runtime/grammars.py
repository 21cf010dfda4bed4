"""Compiling callers' grammars where they can be stopped.

Some small schemas and expressions take llguidance minutes, past its own limits and holding a core that no thread can be made to
give back. So each is compiled first in a process of its own, which is killed when it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
from dataclasses import asdict

from engine.errors import InvalidRequest, Overloaded
from engine.runtime.engine import Structured
from engine.runtime.structured import FIELD, to_grammar

LIMIT_S = 1.0  # vLLM compiles the grammar again, on its own event loop: what passes here may stall others for this long
_START_S = 60.0
_MAX_WAITING = 64
_MEMORY_GIB = 2
_LONGEST_LINE = 1024 * 1024  # bytes of an answer


class Grammars:
    """Checks constraints one at a time in a worker process, which is started when first needed."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._worker: asyncio.subprocess.Process | None = None

    async def check(self, structured: Structured) -> None:
        """Raise InvalidRequest when the constraint cannot be compiled, or not in time; Overloaded when many wait already."""
        if self._waiting >= _MAX_WAITING:
            raise Overloaded(self._waiting, "grammars wait to be compiled")
        self._waiting += 1
        try:
            async with self._turn:
                problem = await self._ask(structured)
        finally:
            self._waiting -= 1
        if problem:
            raise InvalidRequest(problem[0], problem[1])

    async def stop(self) -> None:
        """End the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await _kill(worker)

    async def _ask(self, structured: Structured) -> list[str]:
        worker = await self._running()
        answered = False
        try:
            async with asyncio.timeout(self._limit_s):
                answer = await _exchange(worker, json.dumps(asdict(structured)))
            answered = True
            return answer
        except (TimeoutError, EOFError):
            return [
                f"{FIELD}.{structured.kind}",
                f"takes more than {self._limit_s:g} s or {_MEMORY_GIB} GiB: make it simpler",
            ]
        finally:
            if not answered:  # also when the caller has left: the next one must not read this one's answer
                await self.stop()

    async def _running(self) -> asyncio.subprocess.Process:
        """The worker; one that has just been started is only kept once its first answer is read."""
        if self._worker is None or self._worker.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            command = [sys.executable, "-P", "-m", "engine.runtime.grammars"]  # -P: no modules of the working folder
            worker = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, limit=_LONGEST_LINE, start_new_session=True
            )
            try:
                async with asyncio.timeout(_START_S):
                    await _exchange(worker, json.dumps(asdict(Structured("regex", "a"))))
            except BaseException as error:  # also when the caller has left
                await _kill(worker)
                if isinstance(error, TimeoutError | EOFError):  # the machine is busy or full: no word about the grammar
                    raise Overloaded(self._waiting, "grammars wait to be compiled") from error
                raise
            self._worker = worker
        return self._worker


async def _kill(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.communicate()


async def _exchange(worker: asyncio.subprocess.Process, line: str) -> list[str]:
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the grammar worker has no pipes")
    try:
        worker.stdin.write(line.encode() + b"\n")
        await worker.stdin.drain()
        answer = await worker.stdout.readline()
    except ConnectionError as error:
        raise EOFError from error
    if not answer:
        raise EOFError
    problem: list[str] = json.loads(answer)
    return problem


def _work() -> None:
    """The worker: a constraint per line in, `[]` or `[field, problem]` per line out."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_GIB * 1024**3, _MEMORY_GIB * 1024**3))
    for line in sys.stdin:
        request = json.loads(line)
        value = request["value"]
        problem: tuple[str, ...] = ()
        try:
            to_grammar(Structured(request["kind"], tuple(value) if isinstance(value, list) else value))
        except InvalidRequest as error:
            problem = error.violations[0]
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _work()
