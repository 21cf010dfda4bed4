"""The fake engine passes the suite that the real one passes, and dies as the real one does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.client.testing import write_adapter
from engine.errors import EngineDied, InvalidAdapter
from engine.registry.file_checks import WEIGHTS
from engine.runtime.engine import LoadedAdapter
from engine.runtime.fake import FakeEngine
from tests.engine_suite import EngineSuite, ask


@pytest.fixture
def engine() -> FakeEngine:
    """A fake engine that makes a token every millisecond or so."""
    return FakeEngine(token_interval_s=0.0005)


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[LoadedAdapter, LoadedAdapter]:
    """Two adapters."""
    for name in ("first", "second"):
        write_adapter(tmp_path / name)
    return (
        LoadedAdapter(1, "first@v1#aa", tmp_path / "first", 2),
        LoadedAdapter(2, "second@v1#bb", tmp_path / "second", 2),
    )


@pytest.fixture
def question() -> str:
    """Any prompt will do."""
    return "who are you?"


class TestFakeEngine(EngineSuite):
    """The shared suite."""


async def test_says_who_answers(engine: FakeEngine, adapters: tuple[LoadedAdapter, LoadedAdapter]) -> None:
    """An answer names its adapter and repeats the prompt."""
    await engine.load_adapter(adapters[0])
    assert (await ask(engine, "hi", adapters[0])).text == "first@v1 heard: hi"
    assert (await ask(engine, "hi")).text == "base heard: hi"


async def test_an_adapter_that_is_not_loaded_kills_it(
    engine: FakeEngine, adapters: tuple[LoadedAdapter, LoadedAdapter]
) -> None:
    """What kills vLLM kills the fake: a request that names an adapter which was never loaded."""
    with pytest.raises(EngineDied):
        await ask(engine, "hi", adapters[0])
    assert not engine.alive


async def test_stopped(engine: FakeEngine) -> None:
    """A stopped engine is dead, and stopping it twice is fine."""
    await engine.stop()
    await engine.stop()
    assert not engine.alive
    with pytest.raises(EngineDied):
        await ask(engine, "hi")


async def test_prepares_while_stopped(
    engine: FakeEngine, adapters: tuple[LoadedAdapter, LoadedAdapter], tmp_path: Path
) -> None:
    """Adapters are prepared between two lives of the engine too; weights that are none are refused."""
    await engine.start()
    await engine.stop()
    weights = (adapters[0].folder / WEIGHTS).read_bytes()
    await asyncio.to_thread(engine.prepare, {WEIGHTS: weights}, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == weights
    with pytest.raises(InvalidAdapter):
        engine.prepare({WEIGHTS: b"none"}, tmp_path / "target")


async def test_multibyte_text(engine: FakeEngine) -> None:
    """Half a character is never sent: it waits for its other half."""
    reply = await ask(engine, "größer 日本", max_tokens=100)
    assert reply.text == "base heard: größer 日本"
    assert not any("\ufffd" in delta.text for delta in reply.deltas)
