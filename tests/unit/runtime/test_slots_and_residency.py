"""Admission and residency together: whoever is let in finds room for its adapter, and promotions find theirs."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from engine.errors import InvalidAdapter
from engine.registry.manifest import Manifest
from engine.registry.names import AdapterRef
from engine.runtime.admission import Admission, Rules
from engine.runtime.engine import Sampling
from engine.runtime.generator import Generator
from engine.runtime.requests import GenerationRequest, Prompt
from tests.unit.runtime.conftest import CountingEngine, World, settle, text_of, until


def ask(adapter: str = "", **sampling: Any) -> GenerationRequest:
    """A greedy request."""
    ref = AdapterRef.parse(adapter) if adapter else None
    return GenerationRequest(Prompt(text="hi"), Sampling(**({"temperature": 0} | sampling)), ref)


def generator_for(world: World, capacity: int, patience_s: float = 0.01, load_timeout_s: float = 5.0) -> Generator:
    """A generator with so many slots."""
    admission = Admission(Rules(8, 1000, max_adapter_wait_s=patience_s))
    return Generator(world.engine, world.catalog, admission, world.residency(capacity, load_timeout_s))


async def test_nobody_waits_inside(
    world: World, engine: CountingEngine, three: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three adapters on two slots, no admitted request ever has to wait for another one's slot."""
    engine.token_interval_s = 0.0005
    generator = generator_for(world, capacity=2)
    waits: list[str] = []
    wait = generator.residency._room.wait

    async def spy() -> Any:
        waits.append("waited")
        return await wait()

    monkeypatch.setattr(generator.residency._room, "wait", spy)
    random_ = random.Random(1)
    names = [random_.choice(["a", "b", "c", ""]) for _ in range(80)]
    answers = await asyncio.gather(*(text_of(generator, ask(name)) for name in names))
    assert answers == [f"{name}@v1 heard: hi" if name else "base heard: hi" for name in names]
    assert not waits
    assert engine.most_loaded == 3  # one of them loaded ahead


@pytest.mark.parametrize("seed", range(3))
async def test_operators_and_callers_at_once(
    world: World, engine: CountingEngine, three: list[Manifest], seed: int
) -> None:
    """Pins, preloads and cancelled callers in between: everybody else is answered, and no claim is left behind."""
    engine.token_interval_s = 0.0005
    generator = generator_for(world, capacity=2)
    residency, random_ = generator.residency, random.Random(seed)

    async def operate() -> None:
        for _ in range(15):
            manifest = random_.choice(three)
            await random_.choice([residency.pin, residency.unpin, residency.preload])(manifest)
            await residency.unpin(manifest)
            await asyncio.sleep(0.001)

    async def call() -> str:
        await asyncio.sleep(random_.random() / 10)
        return await text_of(generator, ask(random_.choice("abc")))

    callers = [asyncio.create_task(call()) for _ in range(80)]
    operating = asyncio.create_task(operate())
    for caller in random_.sample(callers, 20):
        await asyncio.sleep(0.002)
        caller.cancel()
    ends = await asyncio.gather(*callers, return_exceptions=True)
    await operating
    assert all(isinstance(end, (str, asyncio.CancelledError)) for end in ends)
    assert engine.most_loaded <= 3  # one of them loaded ahead
    await until(lambda: not residency.claimed)
    assert (generator.admission.running, generator.admission.waiting, generator.admission.running_adapters) == (0, 0, 0)


async def test_a_promotion_under_full_load(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """Preloading a version gets a slot although two busy adapters hold both, and the callers go on."""
    engine.token_interval_s = 0.001
    generator = generator_for(world, capacity=2)
    stop = asyncio.Event()

    async def call(name: str) -> int:
        answered = 0
        while not stop.is_set():
            await text_of(generator, ask(name))
            answered += 1
        return answered

    callers = [asyncio.create_task(call(name)) for name in "aabb"]
    await until(lambda: len(generator.residency.residents()) == 2)
    await asyncio.wait_for(generator.residency.preload(three[2]), 2)
    await asyncio.sleep(0.1)
    stop.set()
    assert min(await asyncio.gather(*callers)) > 1
    assert not generator.residency.claimed


async def test_an_abandoned_load_keeps_its_slot(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """While a load goes on that nobody waits for any more, its slot is not given away."""
    generator = generator_for(world, capacity=1)
    engine.may_load.clear()
    leaving = asyncio.create_task(text_of(generator, ask("a")))
    await until(lambda: engine.loads)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    next_one = asyncio.create_task(text_of(generator, ask("b")))
    await settle()
    assert (generator.admission.running, generator.admission.waiting) == (0, 1)
    engine.may_load.set()
    assert await asyncio.wait_for(next_one, 2) == "b@v1 heard: hi"


async def test_unloading_a_pinned_version_frees_its_slot(world: World, three: list[Manifest]) -> None:
    """A pin ends with the version's unload, in the eyes of admission too."""
    residency = world.residency(capacity=2)
    await residency.pin(three[0])
    assert set(residency.claimed) == {three[0].digest}
    await residency.pin(three[0])
    await residency.unload(three[0])
    assert not residency.claimed


async def test_the_next_adapter_is_loaded_ahead(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """While the only slot is taken, the adapter that is next gets into the engine, so that its request need not wait."""
    engine.token_interval_s = 0.1  # the first answer takes six seconds, or as long as is needed here
    generator = generator_for(world, capacity=1)
    first = asyncio.create_task(text_of(generator, ask("a", max_tokens=60)))
    await until(lambda: generator.admission.running == 1)
    others = [asyncio.create_task(text_of(generator, ask(name, max_tokens=4))) for name in "bc"]
    await until(lambda: three[1].digest in {resident.manifest.digest for resident in generator.residency.residents()})
    assert not first.done()
    assert generator.admission.running_adapters == 1
    engine.token_interval_s = 0.0
    await asyncio.gather(first, *others)
    assert engine.most_loaded == 2


async def test_what_is_loaded_ahead_fails_alone(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A load ahead that fails is its own requests' failure; the others go on, and the engine holds nothing of it."""
    engine.token_interval_s = 0.1
    generator = generator_for(world, capacity=1)
    first = asyncio.create_task(text_of(generator, ask("a", max_tokens=60)))
    await until(lambda: generator.residency.residents())
    engine.failure = InvalidAdapter("load", "b@v1", "no", fix="")
    second = asyncio.create_task(text_of(generator, ask("b")))
    await until(lambda: len(engine.loads) > 1)
    engine.token_interval_s = 0.0
    await first
    with pytest.raises(InvalidAdapter):
        await second
    engine.failure = None
    assert await text_of(generator, ask("c")) == "c@v1 heard: hi"
    assert len(engine.loaded) == 1
