"""The tier in host memory: shared work, bounded room, proof of every byte, and what is prepared ahead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.errors import CorruptVersion, InvalidAdapter, RegistryUnavailable
from engine.registry.cache import LocalCopies
from engine.registry.manifest import Manifest
from engine.registry.worth import Rates
from engine.runtime.residency import HostMemory, shared_folder
from tests.unit.runtime.conftest import World, text_of, until
from tests.unit.runtime.test_slots_and_residency import ask, generator_for


class Preparing:
    """Writes ten bytes for each adapter, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.failure: Exception | None = None

    def __call__(self, files: Mapping[str, bytes], target: Path) -> None:
        """Prepare, or not."""
        self.calls += 1
        if self.failure:
            raise self.failure
        target.write_bytes(b"0123456789")


@pytest.fixture
def preparing() -> Preparing:
    """How adapters are prepared."""
    return Preparing()


def memory_of(world: World, preparing: Preparing, limit: int = 1000) -> HostMemory:
    """A tier with so many bytes."""
    return HostMemory(world.copies, preparing, world.folder / "prepared", limit, world.rates)


async def test_many_callers_one_preparation(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """However many want a version, it is read and prepared once; the next ones find it in memory."""
    memory = memory_of(world, preparing)

    async def want() -> str:
        async with memory.hold(three[0]) as prepared:
            assert prepared.file.read_bytes() == b"0123456789"
            return prepared.tier

    assert set(await asyncio.gather(*(want() for _ in range(8)))) == {"registry"}
    assert await want() == "memory"
    assert preparing.calls == 1


async def test_bounded(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """What was asked for least makes way, its file too, but never what somebody holds."""
    a, b, c = three
    memory = memory_of(world, preparing, limit=20)
    for manifest in (a, a, a, b, c, c):
        world.rates.asked(manifest.digest, time.monotonic())
    async with memory.hold(a), memory.hold(b):
        pass
    async with memory.hold(c):
        assert [manifest.digest in memory for manifest in three] == [True, False, True]
    async with memory.hold(a), memory.hold(b), memory.hold(c) as held:
        assert memory.bytes == 30
        assert held.file.exists()
    assert memory.bytes == 20
    assert len(list((world.folder / "prepared").iterdir())) == 2


async def test_no_room_at_all(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """With a limit of nothing, a version is there for as long as it is held."""
    memory = memory_of(world, preparing, limit=0)
    async with memory.hold(three[0]) as prepared:
        assert prepared.file.exists()
    assert not prepared.file.exists()


@pytest.mark.parametrize("damage", ["changed", "deleted"])
async def test_files_that_change_after_the_check(
    world: World, preparing: Preparing, three: list[Manifest], damage: str
) -> None:
    """A local copy that is swapped or removed after it was checked is noticed when it is read, and fetched again."""
    memory = memory_of(world, preparing)
    folder = await world.copies.get(three[0])
    weights = folder / "adapter_model.safetensors"
    if damage == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        weights.unlink()
    async with memory.hold(three[0]) as prepared:
        assert (prepared.folder / "adapter_config.json").is_file()
    assert preparing.calls == 1


async def test_a_preparation_that_fails(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """It fails for whoever wants that version, leaves no file, and the next try may succeed."""
    memory = memory_of(world, preparing)
    for failure, kind in (
        (InvalidAdapter("load", "a", "no", fix=""), InvalidAdapter),
        (OSError(28, "x"), RegistryUnavailable),
    ):
        preparing.failure = failure
        with pytest.raises(kind):
            async with memory.hold(three[0]):
                pass
        assert not list((world.folder / "prepared").iterdir())
    preparing.failure = None
    async with memory.hold(three[0]), memory.hold(three[1]):
        assert preparing.calls == 4


async def test_downloads_that_hang(
    world: World, preparing: Preparing, three: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold up nobody but their own: a copy that is on disk is prepared meanwhile, and one that was held, again."""
    a, b, c = three
    memory = memory_of(world, preparing, limit=10**9)
    await world.copies.get(c)
    going = asyncio.Event()
    fetch = world.registry.fetch

    async def hang(manifest: Manifest, target: Path) -> None:
        await going.wait()
        await fetch(manifest, target)

    monkeypatch.setattr(world.registry, "fetch", hang)
    with memory.expect(a, prefetch=True), memory.expect(b, prefetch=True):
        await asyncio.sleep(0.05)
        async with asyncio.timeout(3), memory.hold(c) as prepared:
            assert prepared.tier == "disk"
        async with asyncio.timeout(3):
            await memory.recheck(c)
        assert [manifest.digest in memory for manifest in three] == [False, False, True]
        going.set()
        await until(lambda: a.digest in memory and b.digest in memory)


async def test_no_room_for_what_others_download(
    world: World, preparing: Preparing, three: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on its way to memory has its room already: nothing else is prepared ahead in it."""

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    a, b, c = three
    memory = memory_of(world, preparing, limit=2 * a.size_bytes)
    monkeypatch.setattr(world.registry, "fetch", hang)
    with memory.expect(a, prefetch=True), memory.expect(b, prefetch=True), memory.expect(c, prefetch=True):
        assert {a.digest, b.digest} == memory._under_way.keys()


async def test_a_version_that_is_damaged_for_good(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """When the registry's own files are not what was published, nothing is prepared."""

    async def damaged(manifest: Manifest) -> Path:
        raise CorruptVersion(manifest.ref, "truncated")

    memory = memory_of(world, preparing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.copies, "get", damaged)
        with pytest.raises(CorruptVersion):
            async with memory.hold(three[0]):
                pass
    assert not preparing.calls


async def test_prepared_ahead(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """What requests wait for is prepared without anybody holding it, and stays when room is short."""
    a, b, c = three
    memory = memory_of(world, preparing, limit=3 * a.size_bytes)
    with memory.expect(a, prefetch=True):
        await until(lambda: a.digest in memory)
        memory._limit = 20
        for manifest in (b, c):
            world.rates.asked(manifest.digest, time.monotonic())
            async with memory.hold(manifest):
                pass
        assert a.digest in memory
        assert memory.bytes == 20


async def test_not_ahead_of_others_who_wait(world: World, preparing: Preparing, three: list[Manifest]) -> None:
    """Nothing is prepared ahead in the room of what other requests wait for."""
    a, b, _ = three
    memory = memory_of(world, preparing, limit=a.size_bytes)
    with memory.expect(a, prefetch=True):
        await until(lambda: a.digest in memory)
        with memory.expect(b, prefetch=True):
            await asyncio.sleep(0.05)
            assert b.digest not in memory


async def test_the_queue_prepares(world: World, three: list[Manifest]) -> None:
    """While requests wait for a slot, their adapters are got ready: the load then finds them in memory."""
    world.engine.token_interval_s = 0.002
    generator = generator_for(world, capacity=1)
    await asyncio.gather(*(text_of(generator, ask(name, max_tokens=10)) for name in "abc"))
    assert world.counter.found["memory"] == 2


async def test_bounded_disk(world: World, three: list[Manifest]) -> None:
    """Local copies make way by worth; what is held, and the newcomer, have their room."""
    a, b, c = three
    copies = LocalCopies(world.folder / "small", world.registry, limit_bytes=2 * a.size_bytes + 10, rates=world.rates)
    for manifest, times in ((a, 1), (b, 2), (c, 1)):
        for _ in range(times):
            world.rates.asked(manifest.digest, time.monotonic())
    async with copies.hold(a):
        await copies.get(b)
        await copies.get(c)
        assert [manifest.digest in copies for manifest in three] == [True, False, True]
    await copies.get(b)
    assert b.digest in copies
    assert len([manifest for manifest in three if manifest.digest in copies]) == 2


async def test_bounded_disk_while_downloading(world: World, three: list[Manifest]) -> None:
    """What is being downloaded at the same time has its room too: together they do not go over the limit."""
    a, b, c = three
    copies = LocalCopies(world.folder / "small", world.registry, limit_bytes=2 * a.size_bytes + 10, rates=world.rates)
    await copies.get(a)
    await asyncio.gather(copies.get(b), copies.get(c))
    assert [manifest.digest in copies for manifest in three] == [False, True, True]


def test_counts_decay() -> None:
    """Ten requests of two half-lives ago weigh less than three of now; who was never asked for weighs nothing."""
    rates = Rates(half_life_s=10)
    for _ in range(10):
        rates.asked("old", 0.0)
    for _ in range(3):
        rates.asked("new", 20.0)
    assert rates.count("old", 20.0) == pytest.approx(2.5)
    assert rates.worth("new", 20.0) > rates.worth("old", 20.0) > rates.worth("never", 20.0) == 0
    assert rates.worth("new", 20.0, cost=2, size=4) == pytest.approx(1.5)


def test_folders_of_the_dead_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was killed leaves its folder in memory; the next one deletes it."""
    monkeypatch.setattr("engine.runtime.residency.memory._SHARED", tmp_path)
    left, mine = tmp_path / "loraplex-999999999-x", tmp_path / "loraplex-1-x"
    left.mkdir()
    mine.mkdir()
    made = shared_folder(tmp_path / "beside", 0)
    assert made.parent == tmp_path
    assert not left.exists()
    assert mine.exists()
    assert shared_folder(tmp_path / "beside", 2**60).parent == tmp_path / "beside"
