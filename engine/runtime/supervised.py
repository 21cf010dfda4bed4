"""An engine that comes back: one that dies is started again in its place, with the adapters that it held.

To whoever uses it a death is a long pause. Requests wait; those of which nobody has seen anything run again; the others end
with EngineDied, which says how many tokens came. Loads are repeated, and adapters keep their ids, so that residency, pins and
admission have nothing to restore. An engine that has work and makes no step for `max_stall_s` counts as dead. One that dies too
often stays dead, so that whoever watches the server replaces it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Protocol

import structlog

from engine.errors import AdapterLost, EngineDied, LoraplexError, NotFinite
from engine.runtime.engine import (
    ChatTurn,
    Delta,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    LoadedAdapter,
    Sampling,
)

log = structlog.get_logger(__name__)

WINDOW_S = 600.0  # the time in which restarts are counted
_CHECK_S = 0.05  # between looks at the engine: vLLM tells nobody when it dies
_LONGEST_PAUSE_S = 30.0
_RUNS = 2  # a request or load that was there at two deaths may be their cause


class Keeper(Protocol):
    """Whoever loaded the adapters: asked before one is loaded again."""

    async def recheck(self, adapter: LoadedAdapter) -> None:
        """Raise one of our errors when the adapter's files are not as published any more."""
        ...

    def forget(self, adapter: LoadedAdapter) -> None:
        """The adapter could not be loaded again, so it is not in the engine."""
        ...


class Observer(Protocol):
    """Counts what supervision does."""

    def engine_restarted(self, seconds: float) -> None:
        """A dead engine was replaced, so long after its death."""


class Supervised:
    """Wraps an engine whose `start` may be called again after `stop`; at most `max_restarts` times in ten minutes."""

    def __init__(
        self,
        engine: Engine,
        max_restarts: int = 5,
        observer: Observer | None = None,
        pause_s: float = 1.0,
        max_stall_s: float = math.inf,
    ) -> None:
        self.engine = engine
        self.keeper: Keeper | None = None
        self._max_restarts = max_restarts
        self._observer = observer
        self._pause_s = pause_s
        self._stall = _Stall(max_stall_s)
        self._loaded: dict[int, LoadedAdapter] = {}
        self._restarts: deque[float] = deque()  # when; the latest WINDOW_S only
        self._life = 0  # counts engines, so that what belongs to a dead one is known
        self._for_good = False
        self._settled = asyncio.Event()  # not set while restarting
        self._settled.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine's."""
        return self.engine.info

    @property
    def alive(self) -> bool:
        """False once the engine is dead for good; true while it is being restarted."""
        return not self._for_good

    @property
    def ready(self) -> bool:
        """Whether it can generate now."""
        return self._settled.is_set() and self.engine.alive and not self._for_good

    @property
    def steps(self) -> int:
        """The engine's."""
        return self.engine.steps

    def load_now(self) -> EngineLoad:
        """What the engine is doing; nothing while there is none."""
        return self.engine.load_now() if self.ready else EngineLoad(0, 0.0)

    async def start(self) -> None:
        """Start the engine and watch it. The first start is not repeated: what it raises is for the operator."""
        await self.engine.start()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop it for good."""
        self._for_good = True
        self._settled.set()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.engine.stop()

    async def encode(self, text: str) -> list[int]:
        """The engine's tokenizer works without the engine."""
        return await self.engine.encode(text)

    async def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """As `encode`."""
        return await self.engine.encode_chat(turns)

    def check(self, sampling: Sampling) -> None:
        """As the engine."""
        self.engine.check(sampling)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Answer, once more if the engine dies and nobody has seen a token of the first answer.

        Raises EngineDied with the number of tokens that were seen, or AdapterLost.
        """
        for run in range(1, _RUNS + 1):
            await self._until_ready()
            if request.adapter and request.adapter.id not in self._loaded:
                raise AdapterLost(request.adapter.ref)
            life, seen = self._life, 0
            try:
                async with aclosing(self._watched(request)) as deltas:
                    async for delta in deltas:
                        seen += len(delta.token_ids)
                        yield delta
                return
            except EngineDied as error:
                dead = self._died(life)
                problem: LoraplexError = error
            except NotFinite as error:
                if request.adapter:
                    raise
                self._distrust()
                dead, problem = True, error
            if request.on_restart:
                request.on_restart()
                seen = 0
            if seen or run == _RUNS or not dead:
                raise EngineDied(seen) from problem

    async def _watched(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        with self._stall.working():
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    with self._stall.resting():  # the reader's time
                        yield delta

    def prepare(self, files: Mapping[str, bytes], target: Path) -> None:
        """As the engine."""
        self.engine.prepare(files, target)

    async def load_adapter(self, adapter: LoadedAdapter, replaced: LoadedAdapter | None = None) -> None:
        """Load, once more if the engine dies meanwhile."""
        if replaced:
            self._loaded.pop(replaced.id, None)
        for run in range(1, _RUNS + 1):
            await self._until_ready()
            life = self._life
            try:
                with self._stall.working():
                    await self.engine.load_adapter(adapter, replaced)
            except EngineDied:
                if run == _RUNS or not self._died(life):
                    raise
                replaced = None  # the engine that held it is dead
                continue
            if life == self._life:
                self._loaded[adapter.id] = adapter
                return
        raise EngineDied

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Forget the adapter; a dead engine has forgotten it already."""
        self._loaded.pop(adapter.id, None)
        await self.engine.unload_adapter(adapter)

    def _distrust(self) -> None:
        """Give this engine up, though it lives: the base makes no NaN, so somebody else's is in its memory (KV blocks)."""
        log.error("the base model's answer is not a number: the engine is replaced")
        self._settled.clear()

    async def _until_ready(self) -> None:
        self._died(self._life)
        await self._settled.wait()
        if self._for_good:
            raise EngineDied

    def _died(self, life: int) -> bool:
        """Whether the engine of that life is dead, or replaced already; if there is none, everybody waits for the next one."""
        if not self.engine.alive and not self._for_good:
            self._settled.clear()
        return not self.engine.alive or life != self._life

    async def _watch(self) -> None:
        while not self._for_good:
            await asyncio.sleep(_CHECK_S)
            if self._settled.is_set() and self._stall.noticed(self.engine.steps):
                log.error("the engine hangs: it is replaced", seconds=self._stall.limit_s)
                self._settled.clear()
            if self._died(self._life) or not self._settled.is_set():
                await self._revive()

    async def _revive(self) -> None:
        """Start engines until one stays; give up when there were too many of late."""
        died = time.monotonic()
        self._life += 1
        log.error("the engine has died", adapters=len(self._loaded))
        while self._may_restart():
            try:
                await self.engine.stop()
                await asyncio.sleep(self._pause())
                await self.engine.start()
                await self._load_again()
            except Exception:
                log.exception("the engine could not be restarted")
                continue
            seconds = time.monotonic() - died
            log.warning("the engine is back", seconds=round(seconds, 1), adapters=len(self._loaded))
            if self._observer:
                self._observer.engine_restarted(seconds)
            self._settled.set()
            return
        log.error("the engine is dead for good: restart the server", restarts=len(self._restarts))
        self._for_good = True
        self._settled.set()
        await self.engine.stop()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            return False
        self._restarts.append(now)
        return True

    def _pause(self) -> float:
        """Nothing before the first restart of late, then ever longer, so that a broken machine is not kept busy."""
        before = len(self._restarts) - 1
        return min(self._pause_s * 2.0 ** (before - 1), _LONGEST_PAUSE_S) if before else 0.0

    async def _load_again(self) -> None:
        """Load what the dead engine held. What is not as it was, or not wanted any more, stays out."""
        for adapter in list(self._loaded.values()):
            try:
                if self.keeper:
                    await self.keeper.recheck(adapter)
                await self.engine.load_adapter(adapter)
            except EngineDied:
                raise
            except LoraplexError as error:
                log.warning("an adapter is lost", adapter=adapter.ref, problem=error.message)
                if self._loaded.pop(adapter.id, None) and self.keeper:
                    self.keeper.forget(adapter)
                continue
            if adapter.id not in self._loaded:
                await self.engine.unload_adapter(adapter)


class _Stall:
    """Notices an engine that has work and makes no step. A watcher that was not awake itself blames nobody."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._at_work = 0
        self._steps = 0
        self._looked = time.monotonic()
        self._still_s = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """The engine has something to do, for the time of the block."""
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within `working`: nobody waits for the engine, for the time of the block; it may be done long ago."""
        self._at_work -= 1
        try:
            yield
        finally:
            self._at_work += 1

    def noticed(self, steps: int) -> bool:
        """Look: whether there was no step for too long. Time counts from look to look, and hardly if one comes late."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * _CHECK_S), now
        if steps != self._steps or not self._at_work:
            self._steps, self._still_s = steps, 0.0
            return False
        self._still_s += passed
        if self._still_s < self.limit_s:
            return False
        self._still_s = 0.0
        return True
