"""An engine that dies and comes back: who waits, who runs again, who is told, and what is in the engine afterwards."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from engine.client.testing import write_adapter
from engine.errors import AdapterLost, CorruptVersion, EngineDied, NotFinite, Quarantined
from engine.registry.manifest import Manifest
from engine.registry.names import AdapterRef
from engine.runtime.engine import Delta, EngineRequest, LoadedAdapter, Sampling
from engine.runtime.fake import FakeEngine
from engine.runtime.generator import Generator
from engine.runtime.requests import GenerationRequest, Prompt
from engine.runtime.supervised import Supervised, _Stall
from tests.engine_suite import EngineSuite, Reply, ask, request_for
from tests.unit.runtime.conftest import World, text_of, until


class Mortal(FakeEngine):
    """A fake engine whose starts can be held up or made to fail, and which some requests kill."""

    def __init__(self) -> None:
        super().__init__(token_interval_s=0.001)
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.failures = 0  # of starts to come
        self.starts = 0

    async def start(self) -> None:
        """Start, or not."""
        self.starts += 1
        await self.may_start.wait()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        await super().start()

    def die(self) -> None:
        """As after SIGKILL."""
        self.alive = False


@pytest.fixture
async def mortal() -> Mortal:
    """The engine inside."""
    return Mortal()


@pytest.fixture
async def engine(mortal: Mortal) -> Supervised:
    """The engine, supervised and started."""
    supervised = Supervised(mortal, max_restarts=3, pause_s=0.001)
    await supervised.start()
    return supervised


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


class TestSupervised(EngineSuite):
    """A supervised engine behaves as an engine."""


async def test_adapters_come_back(
    engine: Supervised, mortal: Mortal, adapters: tuple[LoadedAdapter, LoadedAdapter]
) -> None:
    """Adapters are loaded again under their ids; one that was unloaded meanwhile stays out."""
    for adapter in adapters:
        await engine.load_adapter(adapter)
    mortal.may_start.clear()
    mortal.die()
    await until(lambda: mortal.starts == 2)
    assert engine.alive
    assert not engine.ready
    await engine.unload_adapter(adapters[1])
    mortal.may_start.set()
    await until(lambda: engine.ready)
    assert mortal.loaded == {1: adapters[0]}
    assert (await ask(engine, "hi", adapters[0])).text == "first@v1 heard: hi"


async def test_waits_for_the_next_engine(
    engine: Supervised, mortal: Mortal, adapters: tuple[LoadedAdapter, LoadedAdapter]
) -> None:
    """Requests and loads that come while there is no engine wait for one."""
    mortal.may_start.clear()
    mortal.die()
    asking = asyncio.create_task(ask(engine, "hi"))
    loading = asyncio.create_task(engine.load_adapter(adapters[0]))
    await until(lambda: mortal.starts == 2)
    assert not asking.done()
    assert not loading.done()
    mortal.may_start.set()
    await asyncio.wait_for(loading, 2)
    assert (await asking).text == "base heard: hi"
    assert mortal.loaded == {1: adapters[0]}


async def test_what_was_seen_is_counted(engine: Supervised, mortal: Mortal) -> None:
    """A request of which tokens were seen ends with their number."""
    request = await request_for(engine, "on and on", max_tokens=500, ignore_eos=True)
    seen = 0

    async def read() -> None:
        nonlocal seen
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                seen += len(delta.token_ids)
                if seen == 5:
                    mortal.die()

    with pytest.raises(EngineDied) as died:
        await read()
    assert died.value.tokens_sent == seen == 5


@pytest.mark.parametrize("late", [False, True])
async def test_what_can_be_taken_back_runs_again(engine: Supervised, mortal: Mortal, late: bool) -> None:
    """A request that can forget its tokens runs again, whole; also if it hears of the death when the next engine is there."""
    forgotten = 0
    deltas = []

    def forget() -> None:
        nonlocal forgotten
        forgotten += len(deltas)
        deltas.clear()

    request = replace(await request_for(engine, "hello"), on_restart=forget)
    async with aclosing(engine.generate(request)) as answer:
        async for delta in answer:
            deltas.append(delta)
            if len(deltas) == 4 and not forgotten:
                mortal.die()
                await until(lambda: not late or (mortal.starts == 2 and engine.ready))
    assert forgotten == 4
    assert Reply(deltas).text == "base heard: hello"


async def test_a_request_that_kills_engines_ends(engine: Supervised, mortal: Mortal) -> None:
    """What was there at two deaths is not tried a third time, and the engine comes back for the others."""
    request = replace(await request_for(engine, "bomb"), on_restart=lambda: None)

    async def read() -> None:
        async with aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                mortal.die()

    with pytest.raises(EngineDied):
        await read()
    assert mortal.starts == 2
    assert (await ask(engine, "hi")).text == "base heard: hi"
    assert mortal.starts == 3


async def test_starts_that_fail(engine: Supervised, mortal: Mortal) -> None:
    """A start that fails is repeated."""
    mortal.failures = 2
    mortal.die()
    assert (await ask(engine, "hi")).text == "base heard: hi"
    assert mortal.starts == 4


async def test_gives_up(engine: Supervised, mortal: Mortal) -> None:
    """After too many restarts the engine is dead for good, and everybody who waits is told."""
    mortal.failures = 99
    mortal.die()
    with pytest.raises(EngineDied):
        await asyncio.wait_for(ask(engine, "hi"), 2)
    assert not engine.alive
    assert not engine.ready
    assert mortal.starts == 4


async def test_deaths_are_counted_together(engine: Supervised, mortal: Mortal) -> None:
    """An engine that starts well but dies again and again is given up, too."""
    for _ in range(3):
        mortal.die()
        await ask(engine, "hi")
    mortal.die()
    await until(lambda: not engine.alive)
    assert mortal.starts == 4


async def test_stop_while_restarting(engine: Supervised, mortal: Mortal) -> None:
    """Stopping ends the restart and whoever waits for it."""
    mortal.may_start.clear()
    mortal.die()
    waiting = asyncio.create_task(ask(engine, "hi"))
    await until(lambda: mortal.starts == 2)
    await asyncio.wait_for(engine.stop(), 2)
    with pytest.raises(EngineDied):
        await asyncio.wait_for(waiting, 2)


@pytest.fixture
async def generator(world: World, engine: Supervised) -> Generator:
    """Everything around the supervised engine."""
    world.engine = engine  # type: ignore[assignment]
    made = world.generator()
    engine.keeper = made.residency
    return made


def question_to(manifest: Manifest) -> GenerationRequest:
    """A greedy request to a version."""
    return GenerationRequest(Prompt(text="hi"), Sampling(temperature=0), AdapterRef(manifest.name, manifest.version))


async def test_pins_survive(generator: Generator, engine: Supervised, mortal: Mortal, three: list[Manifest]) -> None:
    """What was resident and pinned is so after the restart, and answers."""
    await generator.residency.pin(three[0])
    mortal.die()
    assert await text_of(generator, question_to(three[0])) == "a@v1 heard: hi"
    (resident,) = generator.residency.residents()
    assert resident.pinned
    assert list(mortal.loaded.values()) == [resident.adapter]


async def test_death_during_a_load(
    generator: Generator, engine: Supervised, mortal: Mortal, three: list[Manifest]
) -> None:
    """A load that the engine's death interrupts is done by the next engine, for all who wait for it."""
    mortal.may_start.clear()
    mortal.die()
    asking = [asyncio.create_task(text_of(generator, question_to(three[0]))) for _ in range(3)]
    await until(lambda: mortal.starts == 2)
    mortal.may_start.set()
    assert await asyncio.gather(*asking) == ["a@v1 heard: hi"] * 3
    assert len(mortal.loaded) == 1


async def test_a_copy_that_was_changed(
    world: World, generator: Generator, engine: Supervised, mortal: Mortal, three: list[Manifest]
) -> None:
    """A copy that is not as published is not loaded again as it is: it is fetched anew."""
    await generator.residency.preload(three[0])
    (resident,) = generator.residency.residents()
    assert resident.adapter
    weights = resident.adapter.folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(b"\xff" * len(good))
    mortal.die()
    assert await text_of(generator, question_to(three[0])) == "a@v1 heard: hi"
    assert weights.read_bytes() == good


async def test_a_lost_adapter(
    world: World,
    generator: Generator,
    engine: Supervised,
    mortal: Mortal,
    three: list[Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter that cannot be restored is no resident any more; who was on it is told, and the next request loads it."""

    async def damaged(manifest: Manifest) -> Path:
        raise CorruptVersion(manifest.ref, "truncated")

    for manifest in three[:2]:
        await generator.residency.preload(manifest)
    lost = generator.residency.residents()[0].adapter
    assert lost
    with monkeypatch.context() as patch:
        patch.setattr(world.copies, "recheck", damaged)
        mortal.die()
        await until(lambda: mortal.starts == 2 and engine.ready)
    assert generator.residency.residents() == []
    with pytest.raises(AdapterLost):
        await ask(engine, "hi", lost)
    assert engine.ready
    assert await text_of(generator, question_to(three[0])) == "a@v1 heard: hi"


async def test_an_adapter_whose_files_do_not_come(
    world: World,
    generator: Generator,
    engine: Supervised,
    mortal: Mortal,
    three: list[Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A restart waits for an adapter's files no longer than a load does; then the engine is there for all others."""

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    await generator.residency.preload(three[0])
    (resident,) = generator.residency.residents()
    assert resident.adapter
    shutil.rmtree(resident.adapter.folder)
    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "fetch", hang)
        patch.setattr(generator.residency._loader, "timeout_s", 0.05)
        mortal.die()
        await until(lambda: mortal.starts == 2 and engine.ready)
    assert generator.residency.residents() == []


async def test_nan_of_an_adapter(
    generator: Generator, engine: Supervised, mortal: Mortal, three: list[Manifest]
) -> None:
    """The version is refused from then on, leaves the engine with its last request, and the engine stays."""
    await generator.residency.preload(three[0])
    mortal.not_finite.add("a@v1")
    results = await asyncio.gather(
        *(text_of(generator, question_to(three[0])) for _ in range(3)), return_exceptions=True
    )
    assert {type(result) for result in results} == {NotFinite}
    with pytest.raises(Quarantined, match="a@v1"):
        await text_of(generator, question_to(three[0]))
    with pytest.raises(Quarantined):
        await generator.residency.preload(three[0])
    assert not mortal.loaded
    assert mortal.starts == 1
    assert await text_of(generator, question_to(three[1])) == "b@v1 heard: hi"


class Hanging(Mortal):
    """An engine that can be stopped as SIGSTOP stops a process: it neither works nor dies."""

    def __init__(self) -> None:
        super().__init__()
        self.going = asyncio.Event()
        self.going.set()

    async def stop(self) -> None:
        """It is killed, and so the next one goes."""
        await super().stop()
        self.going.set()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Answer as long as it goes."""
        async with aclosing(super().generate(request)) as deltas:
            async for delta in deltas:
                await self.going.wait()
                if not self.alive:
                    raise EngineDied
                yield delta


async def test_an_engine_that_hangs() -> None:
    """One that has work and makes no step is replaced; requests of which nobody saw anything run again."""
    hanging = Hanging()
    engine = Supervised(hanging, pause_s=0.001, max_stall_s=0.3)
    await engine.start()
    hanging.going.clear()
    reply = await asyncio.wait_for(ask(engine, "hello"), 3)
    assert reply.text == "base heard: hello"
    assert hanging.starts == 2
    await engine.stop()


async def test_a_slow_reader() -> None:
    """It is not the engine that makes no step while nobody takes what there is."""
    mortal = Mortal()
    engine = Supervised(mortal, max_stall_s=0.15)
    await engine.start()
    text = ""
    async with aclosing(engine.generate(await request_for(engine, "hello"))) as deltas:
        async for delta in deltas:
            if not text:
                await asyncio.sleep(0.5)
            text += delta.text
    assert text == "base heard: hello"
    assert mortal.starts == 1
    await engine.stop()


async def test_an_engine_that_has_nothing_to_do() -> None:
    """An idle engine makes no steps, and stays; so does one whose watcher slept."""
    engine = Supervised(Mortal(), max_stall_s=0.15)
    await engine.start()
    await asyncio.sleep(0.3)
    stall = _Stall(limit_s=1.0)
    with stall.working():
        assert not stall.noticed(0)
        stall._looked -= 3600
        assert not stall.noticed(0)
    assert engine.ready
    await engine.stop()
