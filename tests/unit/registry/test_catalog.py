"""The catalog answers from memory, and announces every change once."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable

import pytest

from engine.errors import AdapterNotFound, CorruptVersion, Overloaded, RegistryUnavailable
from engine.registry.catalog import AliasChanged, Catalog, Deleted, Published, Subscription
from engine.registry.layout import MANIFEST, alias_file, version_file
from engine.registry.names import AdapterRef
from engine.registry.reader import read_all
from engine.registry.registry import Registry
from engine.registry.store import Store
from engine.registry.subscription import MOST_EVENTS

Make = Callable[..., tuple]


class CountingStore(Store):
    """Counts reads, and fails on demand."""

    reads = 0
    away = False
    unreadable = False
    listings = 0  # of the whole
    pause: asyncio.Event | None = None  # what a listing of the whole waits for
    passes_over: str | None = None  # part of the paths that it does not list

    async def get(self, path: str) -> bytes:
        self.reads += 1
        if self.unreadable:
            raise RegistryUnavailable("reading", "not reachable")
        return await super().get(path)

    async def list(self, prefix: str) -> list[str]:
        if self.away:
            raise RegistryUnavailable("listing", "not reachable")
        found = await super().list(prefix)
        if prefix == "adapters":
            self.listings += 1
            if self.pause:
                await self.pause.wait()
        return [path for path in found if self.passes_over is None or self.passes_over not in path]


@pytest.fixture
def store(store: Store) -> CountingStore:
    """A store that counts reads."""
    return CountingStore(store._backend)


async def publish(registry: Registry, make_checked: Make, seed: int = 0):
    """Publish the adapter of this seed."""
    folder, checked = make_checked(seed)
    return await registry.publish(folder, checked, name="support")


async def waiting(subscription: Subscription) -> list:
    """Take what is waiting, without waiting for more."""
    found = []
    while True:
        try:
            found.append(await asyncio.wait_for(anext(subscription), 0.02))
        except TimeoutError:
            return found


async def test_changes_are_announced_once(registry: Registry, make_checked: Make) -> None:
    """Publications, moves and deletions each reach a listener exactly once, also with refreshes side by side."""
    catalog = Catalog(registry)
    with catalog.subscribe() as listener:
        first = await publish(registry, make_checked)
        await asyncio.gather(*(catalog.refresh() for _ in range(4)))
        second = await publish(registry, make_checked, 1)
        await registry.set_alias("support", "current", "v2")
        await registry.delete_version("support", "v1")
        await catalog.refresh()
        await catalog.refresh()
        moves = await registry.history("support")
        assert await waiting(listener) == [
            Published(first),
            AliasChanged("support", moves[0]),
            Published(second),
            AliasChanged("support", moves[1]),
            Deleted("support", "v1"),
        ]


class LaggingStore(Store):
    """Its first listing takes long to arrive."""

    delay = 0.05

    async def list(self, prefix: str) -> list[str]:
        found = await super().list(prefix)
        delay, self.delay = self.delay, 0.0
        await asyncio.sleep(delay)
        return found


async def test_a_slow_refresh_does_not_undo_a_later_one(registry: Registry, store: Store, make_checked: Make) -> None:
    """An old listing that arrives late neither hides what is new nor has it announced twice."""
    catalog = Catalog(Registry(LaggingStore(store._backend)))
    with catalog.subscribe() as listener:
        slow = asyncio.create_task(catalog.refresh())
        await asyncio.sleep(0.02)
        await publish(registry, make_checked)
        await asyncio.gather(slow, catalog.refresh())
        assert catalog.resolve(AdapterRef.parse("support")).version == "v1"
        assert [type(event) for event in await waiting(listener)] == [Published, AliasChanged]


async def test_refreshes_are_shared(registry: Registry, store: CountingStore, make_checked: Make) -> None:
    """However many ask while one runs, one more reads the store for all of them, and it sees what they know of."""
    catalog = Catalog(registry)
    running = asyncio.create_task(catalog.refresh())
    store.pause = asyncio.Event()
    while not store.listings:
        await asyncio.sleep(0)
    await publish(registry, make_checked)
    before = store.listings
    asking = [asyncio.create_task(catalog.refresh()) for _ in range(50)]
    await asyncio.sleep(0)
    store.pause.set()
    await asking[-1]
    assert "support" in catalog.adapters
    await asyncio.gather(running, *asking)
    assert store.listings == before + 1
    await catalog.refresh()
    assert store.listings == before + 2


async def test_who_leaves_refreshes_for_nobody(registry: Registry, store: CountingStore, make_checked: Make) -> None:
    """If who reads for all is cancelled, the next of them does."""
    await publish(registry, make_checked)
    catalog = Catalog(registry)
    store.pause = asyncio.Event()
    asking = [asyncio.create_task(catalog.refresh()) for _ in range(3)]
    while not store.listings:
        await asyncio.sleep(0)
    asking[0].cancel()
    store.pause.set()
    await asyncio.gather(*asking[1:])
    assert "support" in catalog.adapters


async def test_names_resolve_from_memory(registry: Registry, store: CountingStore, make_checked: Make) -> None:
    """Resolving reads nothing, and a refresh without news reads no object."""
    catalog = Catalog(registry)
    manifest = await publish(registry, make_checked)
    await catalog.refresh()
    reads = store.reads
    await catalog.refresh()
    assert catalog.resolve(AdapterRef.parse("support")) == catalog.resolve(AdapterRef.parse("support@v1")) == manifest
    assert store.reads == reads
    for text, nearest in [("suport", "support"), ("support@v3", "support@v1"), ("support@curent", "support@current")]:
        with pytest.raises(AdapterNotFound) as caught:
            catalog.resolve(AdapterRef.parse(text))
        assert caught.value.nearest == [nearest]


async def test_an_outage_keeps_the_old_view(
    registry: Registry, store: CountingStore, make_checked: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """While the store is away the names still resolve, the log says so once, and news arrive afterwards."""
    catalog = Catalog(registry)
    await publish(registry, make_checked)
    await catalog.refresh()
    store.away = True
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await catalog.refresh()
    assert len(caplog.records) == 1
    assert isinstance(catalog.last_error, RegistryUnavailable)
    assert catalog.resolve(AdapterRef.parse("support")).version == "v1"
    store.away = False
    await publish(registry, make_checked, 1)
    await catalog.refresh()
    assert catalog.last_error is None
    assert catalog.resolve(AdapterRef.parse("support@v2")).version == "v2"


async def test_an_outage_in_the_middle_changes_nothing(
    registry: Registry, store: CountingStore, make_checked: Make
) -> None:
    """A refresh that cannot read all that is new shows none of it, and the next one announces it once."""
    catalog = Catalog(registry)
    await publish(registry, make_checked)
    await catalog.refresh()
    second = await publish(registry, make_checked, 1)
    await registry.set_alias("support", "current", "v2")
    with catalog.subscribe() as listener:
        store.unreadable = True
        await catalog.refresh()
        assert catalog.resolve(AdapterRef.parse("support")).version == "v1"
        store.unreadable = False
        await catalog.refresh()
        assert catalog.resolve(AdapterRef.parse("support")) == second
        assert [type(event) for event in await waiting(listener)] == [Published, AliasChanged]


async def test_a_corrupt_version_hides_nothing_else(registry: Registry, store: Store, make_checked: Make) -> None:
    """One damaged manifest is passed over; the other versions resolve."""
    for seed in range(2):
        await publish(registry, make_checked, seed)
    path = version_file("support", "v2", MANIFEST)
    await store.delete([path])
    await store.create(path, b"{}")
    catalog = Catalog(registry)
    await catalog.refresh()
    assert isinstance(catalog.last_error, CorruptVersion)
    assert list(catalog.adapters["support"].manifests) == ["v1"]
    assert catalog.resolve(AdapterRef.parse("support")).version == "v1"


async def test_a_slow_listener_is_ended(registry: Registry) -> None:
    """Who falls behind gets what is waiting and then Overloaded; the catalog forgets them."""
    catalog = Catalog(registry)
    listener = catalog.subscribe()
    for number in range(MOST_EVENTS + 5):
        listener.push(Deleted("support", f"v{number + 1}"))
    for _ in range(MOST_EVENTS):
        await anext(listener)
    with pytest.raises(Overloaded):
        await anext(listener)
    assert not catalog._subscriptions


async def test_closing_ends_the_wait(registry: Registry) -> None:
    """Closing a subscription ends the loop of whoever waits on it."""
    catalog = Catalog(registry)
    listener = catalog.subscribe()

    async def listen() -> list:
        return [event async for event in listener]

    task = asyncio.create_task(listen())
    await asyncio.sleep(0)
    listener.close()
    assert await task == []
    assert not catalog._subscriptions


async def test_an_incomplete_listing_deletes_nothing(
    registry: Registry, store: CountingStore, make_checked: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A version ends with its tombstone, not because a listing lacks it; what is lacking is told once."""
    await publish(registry, make_checked)
    second = await publish(registry, make_checked, 1)
    catalog = Catalog(registry)
    await catalog.refresh()
    lacking = ["support/v2/", ""]
    for part in lacking:
        store.passes_over = part
        with catalog.subscribe() as listener, caplog.at_level(logging.WARNING):
            await catalog.refresh()
            await catalog.refresh()
            assert await waiting(listener) == []
        assert catalog.resolve(AdapterRef("support", "v2")) == second
        assert isinstance(catalog.last_error, CorruptVersion)
    assert len(caplog.records) == len(lacking)
    store.passes_over = None
    await registry.delete_version("support", "v2")
    await catalog.refresh()
    assert list(catalog.adapter("support").manifests) == ["v1"]
    assert catalog.last_error is None


async def test_a_move_that_one_listing_lacks(registry: Registry, store: CountingStore, make_checked: Make) -> None:
    """No alias jumps over a move that is not listed; once it is, the moves count, and are told, in their order."""
    for seed in range(3):
        await publish(registry, make_checked, seed)
    catalog = Catalog(registry)
    await catalog.refresh()
    for version in ("v2", "v3"):
        await registry.set_alias("support", "current", version)
    first, second, third = await registry.history("support")
    for view in (catalog, Catalog(registry)):
        store.passes_over = alias_file("support", 2)
        with view.subscribe() as listener:
            await view.refresh()
            assert view.adapter("support").history == (first,)
            assert isinstance(view.last_error, CorruptVersion)
            store.passes_over = None
            await view.refresh()
            told = [event for event in await waiting(listener) if isinstance(event, AliasChanged)]
        assert [event.change for event in told][-2:] == [second, third]
        assert view.adapter("support").history == (first, second, third)
        assert view.resolve(AdapterRef.parse("support")).version == "v3"
        assert view.last_error is None


async def test_a_move_that_is_lost(registry: Registry, store: CountingStore, make_checked: Make) -> None:
    """A move that two listings lack holds up the later ones no longer: somebody has deleted it."""
    for seed in range(3):
        await publish(registry, make_checked, seed)
    for version in ("v2", "v3"):
        await registry.set_alias("support", "current", version)
    first, _, third = await registry.history("support")
    store.passes_over = alias_file("support", 2)
    catalog = Catalog(registry)
    await catalog.refresh()
    assert catalog.adapter("support").history == (first,)
    for _ in range(2):
        await catalog.refresh()
        assert catalog.adapter("support").history == (first, third)


async def test_a_reader_who_leaves() -> None:
    """Reads that had not begun when their reader left are closed: Python would warn of each."""
    never = asyncio.Event()

    async def read() -> None:
        await never.wait()

    reads = [read() for _ in range(40)]  # more than are done at once
    reader = asyncio.create_task(read_all(reads))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert {inspect.getcoroutinestate(each) for each in reads} == {inspect.CORO_CLOSED}
