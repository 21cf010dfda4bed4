"""Grammars that explode are stopped, and cost nobody else anything."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest, Overloaded, QuotaExceeded
from engine.runtime.engine import Structured
from engine.runtime.grammars import Grammars
from tests.unit.runtime.conftest import until

EXPLODES = Structured(
    "json_schema", json.dumps({"allOf": [{"type": "string", "pattern": f"a{{0,{i}}}b.*"} for i in range(1, 40)]})
)


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    """A gate whose worker is stopped afterwards."""
    gate = Grammars()
    yield gate
    await gate.stop()


async def test_simple_ones_pass(grammars: Grammars) -> None:
    """Every kind of sound constraint passes, again and again."""
    for _ in range(2):
        await grammars.check(Structured("choice", ("yes", "no")))
        await grammars.check(Structured("json_schema", '{"type": "integer"}'))
        await grammars.check(Structured("regex", "[0-9]{3}"))
        await grammars.check(Structured("grammar", 'start: "a" | "b"'))


async def test_broken_one_names_its_field(grammars: Grammars) -> None:
    """What the library refuses is the caller's field."""
    with pytest.raises(InvalidRequest, match=r"sampling\.structured\.regex"):
        await grammars.check(Structured("regex", "("))


async def test_exploding_one_is_stopped(grammars: Grammars) -> None:
    """A schema that would hold a core for minutes is refused, and the next one is checked as ever."""
    async with asyncio.timeout(30):
        with pytest.raises(InvalidRequest, match="make it simpler"):
            await grammars.check(EXPLODES)
        await grammars.check(Structured("regex", "a+"))


async def test_caller_who_leaves(grammars: Grammars) -> None:
    """A caller who gives up does not leave an answer behind for the next one."""
    await grammars.check(Structured("regex", "a+"))
    leaving = asyncio.create_task(grammars.check(EXPLODES))
    await asyncio.sleep(0.1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    with pytest.raises(InvalidRequest, match="regex"):
        await grammars.check(Structured("regex", "("))


async def test_caller_who_leaves_while_the_worker_starts(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's first answer is left behind for nobody, and a worker that nobody waited for is gone."""
    started: list[asyncio.subprocess.Process] = []
    plainly = asyncio.create_subprocess_exec

    async def start(*command: str, **more: Any) -> asyncio.subprocess.Process:
        started.append(await plainly(*command, **more))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    leaving = asyncio.create_task(grammars.check(Structured("regex", "a+")))
    await until(lambda: bool(started))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    with pytest.raises(InvalidRequest, match="regex"):
        await grammars.check(Structured("regex", "("))
    await grammars.check(Structured("regex", "b+"))
    assert [worker.returncode is None for worker in started] == [False, True]


@pytest.mark.parametrize("how", ["too slow", "dead"])
async def test_worker_that_does_not_start(grammars: Grammars, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A worker that does not come up is no fault of the grammar: the caller may try again, and then it is checked."""
    with monkeypatch.context() as patch:
        if how == "dead":
            patch.setattr("sys.executable", shutil.which("true"))
        else:
            patch.setattr("engine.runtime.grammars._START_S", 0.01)
        with pytest.raises(Overloaded):
            await grammars.check(Structured("regex", "a+"))
    await grammars.check(Structured("regex", "a+"))


async def test_files_of_the_working_folder_are_no_modules_of_the_worker(
    grammars: Grammars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside which the server was started may be called as a module of Python's."""
    (tmp_path / "asyncio.py").write_text("raise SystemExit('my own')")
    monkeypatch.chdir(tmp_path)
    await grammars.check(Structured("regex", "a+"))


async def test_worker_that_dies(grammars: Grammars) -> None:
    """After its worker was killed, the gate starts another one."""
    await grammars.check(Structured("regex", "a+"))
    await grammars.stop()
    await grammars.check(Structured("regex", "b+"))


class Slow:
    """A worker's stand-in: writes down what it is asked, and answers when it is told to."""

    def __init__(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch, problem: list[str]) -> None:
        self.asked: list[str] = []
        self.answers = asyncio.Semaphore(0)
        self._problem = problem
        monkeypatch.setattr(grammars, "_ask", self._ask)

    async def _ask(self, structured: Structured, _line: str) -> list[str]:
        self.asked.append(str(structured.value))
        await self.answers.acquire()
        return self._problem


@pytest.mark.parametrize("problem", [[], ["sampling.structured.regex", "no"]])
async def test_verdicts_are_remembered(grammars: Grammars, monkeypatch: pytest.MonkeyPatch, problem: list[str]) -> None:
    """Good or bad, a grammar is compiled once, also for those who ask while it is."""
    slow = Slow(grammars, monkeypatch, problem)
    asking = [asyncio.create_task(grammars.check(Structured("regex", "a"), "acme")) for _ in range(10)]
    await asyncio.sleep(0)
    slow.answers.release()
    found = await asyncio.gather(*asking, grammars.check(Structured("regex", "a"), "rival"), return_exceptions=True)
    assert [isinstance(one, InvalidRequest) for one in found] == [bool(problem)] * 11
    slow.answers.release()
    await asyncio.gather(grammars.check(Structured("regex", "b")), return_exceptions=True)
    assert slow.asked == ["a", "b"]


async def test_too_slow_is_not_for_ever(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """What took too long, maybe on a busy machine, is tried again after a while."""
    structured = Structured("regex", "a")
    slow = Slow(grammars, monkeypatch, grammars._too_slow(structured))
    monkeypatch.setattr("engine.runtime.grammars._SLOW_S", 0.0)
    for times in (1, 2):
        slow.answers.release()
        with pytest.raises(InvalidRequest):
            await grammars.check(structured)
        assert len(slow.asked) == times


async def test_tenants_take_turns(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who has many grammars waiting, and may have no more, does not keep another waiting for all of them."""
    slow = Slow(grammars, monkeypatch, [])
    asking = [asyncio.create_task(grammars.check(Structured("regex", f"rude {i}"), "rude")) for i in range(64)]
    await asyncio.sleep(0)
    with pytest.raises(QuotaExceeded):
        await grammars.check(Structured("regex", "one more"), "rude")
    asking += [asyncio.create_task(grammars.check(Structured("regex", f"polite {i}"), "polite")) for i in range(2)]
    await asyncio.sleep(0)
    asking[1].cancel()
    for _ in asking:
        slow.answers.release()
    await asyncio.gather(*asking, return_exceptions=True)
    assert slow.asked[:5] == ["rude 0", "rude 2", "polite 0", "rude 3", "polite 1"]
    assert len(slow.asked) == 65
    slow.answers.release()
    await grammars.check(Structured("regex", "afterwards"), "rude")
