"""Grammars that explode are stopped, and cost nobody else anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from engine.errors import InvalidRequest
from engine.runtime.engine import Structured
from engine.runtime.grammars import Grammars

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


async def test_worker_that_dies(grammars: Grammars) -> None:
    """After its worker was killed, the gate starts another one."""
    await grammars.check(Structured("regex", "a+"))
    await grammars.stop()
    await grammars.check(Structured("regex", "b+"))
