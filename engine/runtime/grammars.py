"""Compiling callers' grammars where they can be stopped.

Some small schemas and expressions take llguidance minutes, past its own limits and holding a core that no thread can be made to
give back. So each is compiled first in a process of its own, which is killed when it takes too long. What came of it is
remembered, and tenants take turns: one who sends such grammars costs another a turn, and not structured output.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import asdict

from engine.errors import InvalidRequest, Overloaded, QuotaExceeded
from engine.runtime.engine import Structured
from engine.runtime.structured import FIELD, to_grammar

LIMIT_S = 1.0  # vLLM compiles the grammar again, on its own event loop: what passes here may stall others for this long
_START_S = 60.0
_MAX_WAITING = 256
_MAX_WAITING_OF_TENANT = 64
_MAX_REMEMBERED = 4096
_SLOW_S = 60.0  # how long one that took too long is refused unseen: the machine may only have been busy
_MEMORY_GIB = 2
_LONGEST_LINE = 1024 * 1024  # bytes of an answer


class Grammars:
    """Checks constraints one at a time in a worker process, which is started when first needed."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._turns = _Turns()
        self._waiting: Counter[str] = Counter()  # by tenant
        self._worker: asyncio.subprocess.Process | None = None
        self._found: dict[bytes, tuple[float, list[str]]] = {}  # until when, and the problem; by digest, oldest first

    async def check(self, structured: Structured, tenant: str = "") -> None:
        """Raise InvalidRequest when the constraint cannot be compiled, or not in time.

        Raises QuotaExceeded when many of the tenant wait already, and Overloaded when many of all do.
        """
        line = json.dumps(asdict(structured))
        digest = hashlib.sha256(line.encode()).digest()
        problem = self._known(digest)
        if problem is None:
            async with self._turn(tenant):
                problem = self._known(digest)  # somebody before may have asked the same
                if problem is None:
                    problem = await self._ask(structured, line)
                    slow = problem == self._too_slow(structured)
                    self._found[digest] = time.monotonic() + _SLOW_S if slow else math.inf, problem
                    if len(self._found) > _MAX_REMEMBERED:
                        del self._found[next(iter(self._found))]
        if problem:
            raise InvalidRequest(problem[0], problem[1])

    def _known(self, digest: bytes) -> list[str] | None:
        until, problem = self._found.get(digest, (0.0, None))
        if time.monotonic() < until:
            return problem
        self._found.pop(digest, None)
        return None

    @contextlib.asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        if self._waiting[tenant] >= _MAX_WAITING_OF_TENANT:
            raise QuotaExceeded(tenant, f"has {self._waiting[tenant]} grammars that wait to be compiled", self._limit_s)
        if (waiting := self._waiting.total()) >= _MAX_WAITING:
            raise Overloaded(waiting, "grammars wait to be compiled")
        self._waiting[tenant] += 1
        try:
            async with self._turns.of(tenant):
                yield
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    async def stop(self) -> None:
        """End the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await _kill(worker)

    async def _ask(self, structured: Structured, line: str) -> list[str]:
        worker = await self._running()
        answered = False
        try:
            async with asyncio.timeout(self._limit_s):
                answer = await _exchange(worker, line)
            answered = True
            return answer
        except (TimeoutError, EOFError):
            return self._too_slow(structured)
        finally:
            if not answered:  # also when the caller has left: the next one must not read this one's answer
                await self.stop()

    def _too_slow(self, structured: Structured) -> list[str]:
        problem = f"takes more than {self._limit_s:g} s or {_MEMORY_GIB} GiB: make it simpler"
        return [f"{FIELD}.{structured.kind}", problem]

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
                    raise Overloaded(self._waiting.total(), "grammars wait to be compiled") from error
                raise
            self._worker = worker
        return self._worker


class _Turns:
    """One at a time; those who wait in the order in which they came, but the tenants in turn."""

    def __init__(self) -> None:
        self._taken = False
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant, who is next first

    @contextlib.asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """A tenant's turn, for the time of the block."""
        if self._taken:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queues.setdefault(tenant, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came just as the caller left
                    self._pass_on()
                raise
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._queues:
            tenant = next(iter(self._queues))
            queue = self._queues.pop(tenant)
            while queue and (turn := queue.popleft()).done():
                pass  # its caller has left
            if queue:
                self._queues[tenant] = queue  # behind the others
            if not turn.done():
                turn.set_result(None)  # still taken: whoever comes now does not go first
                return
        self._taken = False


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
