"""Residency: what is in the engine, who waits for it, and who has to go."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CorruptVersion, InvalidAdapter, NotAllowedNow, Overloaded, RegistryUnavailable, WrongBase
from engine.registry.cache import LocalCopies
from engine.registry.file_checks import WEIGHTS
from engine.registry.layout import version_file
from engine.registry.manifest import Manifest
from engine.runtime.engine import LoadedAdapter
from engine.runtime.fake import FakeEngine
from engine.runtime.residency import Residency
from tests.unit.runtime.conftest import CountingEngine, World, settle, until


def names(residency: Residency) -> list[str]:
    """What is resident."""
    return [resident.manifest.ref for resident in residency.residents()]


async def test_loads_once_and_keeps(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """The first lease loads, the next one finds the adapter there."""
    residency = world.residency()
    async with residency.lease(three[0]) as lease:
        assert lease.waited_s > 0
        assert lease.adapter.id in engine.loaded
        assert lease.adapter.name.startswith("a@v1#")
    async with residency.lease(three[0]) as lease:
        assert lease.waited_s == 0
    assert len(engine.loads) == 1
    assert world.counter.loaded == 1


async def test_least_recently_used_goes(world: World, three: list[Manifest]) -> None:
    """When all slots are taken, the version that nobody has used for longest is evicted."""
    a, b, c = three
    residency = world.residency(capacity=2)
    await residency.preload(a)
    await residency.preload(b)
    await residency.preload(a)
    await residency.preload(c)
    assert names(residency) == ["a@v1", "c@v1"]
    assert world.counter.evicted == 1


async def test_never_more_than_the_capacity(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """However callers mix, the engine never holds more adapters than it has slots for."""
    residency = world.residency(capacity=2)

    async def use(manifest: Manifest) -> None:
        async with residency.lease(manifest) as lease:
            assert lease.adapter.id in engine.loaded
            await asyncio.sleep(0.001)
            assert lease.adapter.id in engine.loaded

    await asyncio.gather(*(use(manifest) for _ in range(10) for manifest in three))
    assert engine.most_loaded == 2
    assert {resident.in_use for resident in residency.residents()} == {0}


async def test_one_in_use_stays(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A version in use is not evicted, even if it is the least recently used."""
    a, b, c = three
    residency = world.residency(capacity=2)
    async with residency.lease(a) as lease:
        await residency.preload(b)
        await residency.preload(c)
        assert names(residency) == ["a@v1", "c@v1"]
        assert lease.adapter.id in engine.loaded


async def test_pinned_stays(world: World, three: list[Manifest]) -> None:
    """A pinned version is not evicted until it is unpinned."""
    a, b, c = three
    residency = world.residency(capacity=2)
    await residency.pin(a)
    await residency.preload(b)
    await residency.preload(c)
    assert names(residency) == ["a@v1", "c@v1"]
    await residency.unpin(a)
    await residency.preload(b)
    assert names(residency) == ["b@v1", "c@v1"]


async def test_one_slot_stays_unpinned(world: World, three: list[Manifest]) -> None:
    """Pinning every slot would lock all other adapters out, so it is refused; pinning twice is not."""
    a, b, _ = three
    residency = world.residency(capacity=2)
    await residency.pin(a)
    await residency.pin(a)
    with pytest.raises(NotAllowedNow, match="pinned"):
        await residency.pin(b)


async def test_pins_at_the_same_time(world: World, three: list[Manifest]) -> None:
    """Pins that come together leave one slot free too."""
    residency = world.residency(capacity=2)
    ends = await asyncio.gather(residency.pin(three[0]), residency.pin(three[1]), return_exceptions=True)
    assert [type(end) for end in ends].count(NotAllowedNow) == 1
    assert len(residency.claimed) == 1


async def test_one_load_for_many_callers(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """Callers who come while a version is being loaded wait for that load."""
    residency = world.residency()
    engine.may_load.clear()
    callers = [asyncio.create_task(residency.preload(three[0])) for _ in range(8)]
    await until(lambda: engine.loads)
    await settle()
    engine.may_load.set()
    await asyncio.gather(*callers)
    assert len(engine.loads) == 1


async def test_a_caller_who_leaves(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """The caller who started a load may leave: the others get their adapter."""
    residency = world.residency()
    engine.may_load.clear()
    first, second = (asyncio.create_task(residency.preload(three[0])) for _ in range(2))
    await until(lambda: engine.loads)
    first.cancel()
    await settle()
    engine.may_load.set()
    await second
    assert first.cancelled()
    assert len(engine.loads) == 1
    assert residency.residents()[0].in_use == 0


async def test_all_callers_leave(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A load that nobody waits for any more ends, and what it loaded can be used or evicted."""
    a, b, c = three
    residency = world.residency(capacity=1)
    engine.may_load.clear()
    caller = asyncio.create_task(residency.preload(a))
    await until(lambda: engine.loads)
    caller.cancel()
    await settle()
    engine.may_load.set()
    await until(residency.residents)
    await residency.preload(b)
    await residency.preload(c)
    assert names(residency) == ["c@v1"]


async def test_a_load_that_nobody_waits_for_fails_quietly(
    world: World, engine: CountingEngine, three: list[Manifest]
) -> None:
    """The failure of an abandoned load is no lost exception of asyncio's, and frees the slot."""
    residency = world.residency(capacity=1)
    engine.may_load.clear()
    engine.failure = InvalidAdapter("load", "a", "no", fix="")
    caller = asyncio.create_task(residency.preload(three[0]))
    await until(lambda: engine.loads)
    caller.cancel()
    await settle()
    engine.may_load.set()
    await settle()
    engine.failure = None
    await residency.preload(three[1])
    assert names(residency) == ["b@v1"]


async def test_failed_load(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A failed load reaches every caller who waits for it, frees its slot, and the next attempt may succeed."""
    residency = world.residency(capacity=1)
    engine.failure = InvalidAdapter("load", "a@v1", "vLLM refuses to load it", fix="")
    results = await asyncio.gather(*(residency.preload(three[0]) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, InvalidAdapter) for result in results)
    assert not residency.residents()
    engine.failure = None
    await residency.preload(three[1])
    await residency.preload(three[0])
    assert names(residency) == ["a@v1"]


@pytest.mark.parametrize("damaged_first", [True, False])
async def test_the_same_bytes_under_another_name(world: World, damaged_first: bool) -> None:
    """Names whose versions are alike share loads, but not what becomes of the other one's files, nor its name."""
    damaged, whole = await world.publish("theirs", seed=7), await world.publish("ours", seed=7)
    assert damaged.digest == whole.digest
    await world.registry._store.delete([version_file("theirs", "v1", WEIGHTS)])
    residency = world.residency()
    order = [damaged, whole] if damaged_first else [whole, damaged]
    results = await asyncio.gather(*(residency.preload(each) for each in order * 2), return_exceptions=True)
    ended = {each.ref: result for each, result in zip(order * 2, results, strict=True)}
    assert ended["ours@v1"] is None
    assert ended["theirs@v1"] is None or "theirs@v1" in str(ended["theirs@v1"])
    assert residency.is_resident(whole.digest)
    assert not residency.claimed
    assert [resident.in_use for resident in residency.residents()] == [0]


async def test_the_same_bytes_are_fetched_for_each_name(world: World) -> None:
    """Neither host memory nor the local copies take another name's damage for that of these files."""
    damaged, whole = await world.publish("theirs", seed=7), await world.publish("ours", seed=7)
    await world.registry._store.delete([version_file("theirs", "v1", WEIGHTS)])
    memory = world.memory()
    memory.prefetch(damaged)
    async with memory.hold(whole) as prepared:
        assert prepared.tier == "registry"
    other = LocalCopies(world.folder / "others", world.registry)
    first, second = await asyncio.gather(other.get(damaged), other.get(whole), return_exceptions=True)
    assert isinstance(first, CorruptVersion)
    assert isinstance(second, Path)


async def test_wrong_base(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A version for another base is refused before anything is fetched, naming both fingerprints."""
    other = "sha256:" + "0" * 64
    residency = world.residency(fingerprint=other)
    with pytest.raises(WrongBase) as refusal:
        await residency.preload(three[0])
    assert other in refusal.value.message
    assert world.base.fingerprint in refusal.value.message
    assert not engine.loads


async def test_wrong_base_of_bytes_that_are_resident(world: World, three: list[Manifest]) -> None:
    """The same bytes under the name of a version of this base do not make a version of another base right."""
    residency = world.residency()
    await residency.preload(three[0])
    base = three[0].base.model_copy(update={"fingerprint": "sha256:" + "0" * 64})
    foreign = three[0].model_copy(update={"name": "foreign", "base": base})
    for act in (residency.preload, residency.pin):
        with pytest.raises(WrongBase):
            await act(foreign)
    assert not residency.residents()[0].pinned


async def test_every_slot_in_use(world: World, three: list[Manifest]) -> None:
    """Nobody waits longer than the load timeout for a slot; then the server is full, and the slot is still good."""
    a, b, c = three
    residency = world.residency(capacity=2, load_timeout_s=0.5)
    async with residency.lease(a), residency.lease(b):
        with pytest.raises(Overloaded, match="adapters are in use"):
            await residency.preload(c)
    await residency.preload(c)
    assert "c@v1" in names(residency)


async def test_waits_for_a_slot(world: World, three: list[Manifest]) -> None:
    """A slot that becomes free in time is taken."""
    a, b, _ = three
    residency = world.residency(capacity=1)
    async with residency.lease(a):
        waiting = asyncio.create_task(residency.preload(b))
        await settle()
        assert not waiting.done()
    await asyncio.wait_for(waiting, 2)
    assert names(residency) == ["b@v1"]


async def test_unpinning_makes_room(world: World, three: list[Manifest]) -> None:
    """Who waits for a slot gets one that an unpin sets free."""
    a, b, c = three
    residency = world.residency(capacity=2)
    await residency.pin(a)
    async with residency.lease(b):
        waiting = asyncio.create_task(residency.preload(c))
        await settle()
        assert not waiting.done()
        await residency.unpin(a)
        await asyncio.wait_for(waiting, 2)


async def test_ids_are_never_used_twice(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """The same version, loaded again, has another id: nothing that the engine kept can be taken for it."""
    a, b, _ = three
    residency = world.residency(capacity=1)
    for manifest in (a, b, a, b, a):
        await residency.preload(manifest)
    await residency.unload(a)
    await residency.preload(a)
    ids = [adapter.id for adapter in engine.loads]
    assert len(set(ids)) == len(ids) == 6
    assert min(ids) >= 1


async def test_failed_ids_are_never_used_again(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """Not even the id of a load that failed comes back."""
    residency = world.residency()
    engine.failure = InvalidAdapter("load", "a", "no", fix="")
    with pytest.raises(InvalidAdapter):
        await residency.preload(three[0])
    engine.failure = None
    await residency.preload(three[0])
    assert engine.loads[0].id != engine.loads[1].id


async def test_unload(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """Unloading takes a version out of the engine, and says whether it was in."""
    residency = world.residency()
    await residency.preload(three[0])
    assert await residency.unload(three[0])
    assert not await residency.unload(three[0])
    assert not engine.loaded


async def test_unload_while_in_use(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A version that a request uses, or that is on its way, is not unloaded."""
    residency = world.residency()
    async with residency.lease(three[0]):
        with pytest.raises(NotAllowedNow, match="in use by 1"):
            await residency.unload(three[0])
    engine.may_load.clear()
    loading = asyncio.create_task(residency.preload(three[1]))
    await until(lambda: len(engine.loads) == 2)
    with pytest.raises(NotAllowedNow):
        await residency.unload(three[1])
    engine.may_load.set()
    await loading


async def test_what_goes_last(world: World, three: list[Manifest]) -> None:
    """What a rollback would need stays while its successor is being loaded, even if it is the oldest."""
    a, b, c = three
    residency = world.residency(capacity=2)
    await residency.preload(a)
    await residency.preload(b)
    with residency.evict_last(a):
        await residency.preload(c)
    assert names(residency) == ["a@v1", "c@v1"]
    assert residency.residents()[0].in_use == 0
    await residency.preload(b)
    assert names(residency) == ["b@v1", "c@v1"]


@pytest.mark.parametrize("pins", [0, 1, 2])
async def test_what_goes_last_with_one_slot(world: World, three: list[Manifest], pins: int) -> None:
    """With room for one more adapter only, keeping the previous would block the next for ever: it is let go."""
    a, b, _ = three
    residency = world.residency(capacity=1 + pins)
    for number in range(pins):
        await residency.pin(await world.publish(f"pinned-{number}"))
    await residency.preload(a)
    with residency.evict_last(a):
        await residency.preload(b)
    assert names(residency)[0] == "b@v1"
    assert len(names(residency)) == 1 + pins


async def test_what_goes_last_is_not_loaded(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """Keeping does not load."""
    residency = world.residency()
    with residency.evict_last(three[0]):
        await residency.preload(three[1])
    assert len(engine.loads) == 1


async def test_what_goes_last_and_is_in_quarantine(world: World, three: list[Manifest]) -> None:
    """A version in quarantine that answers still hold leaves with the last of them all the same."""
    residency = world.residency()
    with residency.evict_last(three[0]):
        async with residency.lease(three[0]):
            residency.quarantine(three[0])
        assert names(residency) == []


@pytest.mark.parametrize("lost", [False, True])
async def test_what_leaves_makes_room(world: World, three: list[Manifest], lost: bool) -> None:
    """Who waits for a slot gets that of a pinned version that is unloaded, or that a new engine could not load."""
    a, b, c = three
    residency = world.residency(capacity=2)
    await residency.pin(a)
    (pinned,) = residency.residents()
    assert pinned.adapter
    async with residency.lease(b):
        waiting = asyncio.create_task(residency.preload(c))
        await settle()
        assert not waiting.done()
        if lost:
            residency.forget(pinned.adapter)
        else:
            await residency.unload(a)
        await waiting
    assert names(residency) == ["b@v1", "c@v1"]


async def delete_first(world: World, name: str) -> None:
    """Publish another version, make it the current one, and delete the first; this server hears of it."""
    await world.publish(name)
    await world.registry.set_alias(name, "current", "v2")
    await world.registry.delete_version(name, "v1")
    await world.catalog.refresh()


async def test_what_is_deleted_leaves(world: World, engine: CountingEngine, three: list[Manifest]) -> None:
    """A version that is deleted, by whomever, is pinned no more and leaves with its last request."""
    a, b, _ = three
    residency = world.residency(capacity=3)
    following = asyncio.create_task(residency.follow(world.catalog))
    await residency.pin(a)
    await residency.pin(b)
    async with residency.lease(a) as lease:
        await delete_first(world, "a")
        await delete_first(world, "b")
        await until(lambda: not residency.claimed and names(residency) == ["a@v1"])
        assert lease.adapter.id in engine.loaded
        assert residency.find("a", "v1")
    assert not residency.find("a", "v1")
    assert not engine.loaded
    following.cancel()


async def test_bytes_that_are_deleted_under_one_of_their_names(world: World) -> None:
    """They stay, as the pin may have been meant for the other one."""
    first, second = await world.publish("first", seed=7), await world.publish("second", seed=7)
    gone = await world.publish("third")
    residency = world.residency(capacity=4)
    following = asyncio.create_task(residency.follow(world.catalog))
    for manifest in (first, second, gone):
        await residency.pin(manifest)
    await delete_first(world, "first")
    await delete_first(world, "third")
    await until(lambda: not residency.is_resident(gone.digest))
    assert residency.claimed.keys() == {second.digest}
    await residency.unpin(second)
    assert not residency.claimed
    following.cancel()


async def test_stages(world: World, three: list[Manifest]) -> None:
    """A load tells what it is doing, in order."""
    stages: list[tuple[str, str]] = []
    await world.residency().preload(three[0], lambda stage, detail: stages.append((stage, detail)))
    assert [stage for stage, _ in stages] == ["loading", "loading", "probing"]
    assert all("a@v1" in detail for _, detail in stages)


async def test_slow_registry(world: World, three: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer is given up after the load timeout, and the slot is free again."""
    residency = world.residency(capacity=1, load_timeout_s=0.05)

    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "fetch", hang)
        with pytest.raises(RegistryUnavailable, match="took too long"):
            await residency.preload(three[0])
    residency._loader.timeout_s = 30.0  # this machine may be busy
    await residency.preload(three[1])


async def test_residents_in_order(world: World) -> None:
    """Residents are listed by name, and versions as numbers: v10 after v9."""
    manifests = [await world.publish("a") for _ in range(10)]
    residency = world.residency(capacity=3)
    for version in (9, 1, 8):
        await residency.preload(manifests[version])
    assert names(residency) == ["a@v2", "a@v9", "a@v10"]


class Ineffective(FakeEngine):
    """Loads adapters, and answers as the base does."""

    async def generate(self, request: Any) -> Any:
        """The adapter is there, but nobody asks it."""
        async for delta in super().generate(replace(request, adapter=None)):
            yield delta


class Sick(FakeEngine):
    """Adapters answer in NaN."""

    async def generate(self, request: Any) -> Any:
        """Replace an adapter's numbers."""
        async for delta in super().generate(request):
            if request.adapter:
                broken = tuple(
                    replace(place, token=replace(place.token, logprob=math.nan)) for place in delta.prompt_logprobs
                )
                yield replace(delta, prompt_logprobs=broken)
            else:
                yield delta


@pytest.mark.parametrize(("kind", "problem"), [(Ineffective, "changes nothing"), (Sick, "NaN")])
async def test_probe_refuses(world: World, three: list[Manifest], kind: type[FakeEngine], problem: str) -> None:
    """An adapter without effect, or with one that is no number, is refused by name and taken out again."""
    world.engine = kind()
    residency = world.residency(capacity=1)
    with pytest.raises(InvalidAdapter, match=problem) as refusal:
        await residency.preload(three[0])
    assert refusal.value.check == "probe"
    assert refusal.value.where == "a@v1"
    assert not world.engine.loaded
    assert not residency.residents()


async def test_probe_asks_the_base_once(world: World, three: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of adapters is compared with one answer of the base."""
    asked: list[LoadedAdapter | None] = []
    generate = world.engine.generate

    def spy(request: Any) -> Any:
        asked.append(request.adapter)
        return generate(request)

    monkeypatch.setattr(world.engine, "generate", spy)
    residency = world.residency(capacity=3)
    await asyncio.gather(*(residency.preload(manifest) for manifest in three))
    assert asked.count(None) == 1
    assert len(asked) == 4
