"""Which adapters are in the engine.

A request may only name an adapter that this file has loaded, confirmed and probed, and that stays loaded until the request
lets go of its lease. We evict before the engine would: what is worth least (registry/worth.py), never what is in use or pinned,
and what requests wait for only if there is nothing else (table.py). What a load does is in loading.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import structlog

from engine.errors import LoraplexError, NotAllowedNow, Overloaded, Quarantined, WrongBase
from engine.registry.catalog import Catalog
from engine.registry.manifest import Manifest
from engine.registry.subscription import Deleted, InEngine
from engine.registry.worth import Rates
from engine.runtime.engine import Engine, LoadedAdapter
from engine.runtime.residency.loading import Loader, OnStage
from engine.runtime.residency.memory import HostMemory, Tier
from engine.runtime.residency.table import Occupant, SlotTable

log = structlog.get_logger(__name__)


class Observer(Protocol):
    """Counts what residency does."""

    def adapter_found(self, tier: Tier) -> None:
        """A request needed an adapter, and this tier had it."""

    def adapter_loaded(self, seconds: float, tier: Tier) -> None:
        """An adapter was loaded, and probed if it was the first time; this tier had it."""

    def adapter_evicted(self, tier: Tier) -> None:
        """An adapter made way in this tier."""


@dataclass
class Resident(Occupant):
    """An adapter version in the engine, or on its way there."""

    manifest: Manifest
    replaces: LoadedAdapter | None = None  # still in the engine, in the slot that this one will take
    adapter: LoadedAdapter | None = None
    loading: asyncio.Task[None] | None = None
    deleted: bool = False  # from the registry: it leaves with its last request
    last_used: float = field(default_factory=time.monotonic, kw_only=True)

    @property
    def ready(self) -> bool:
        """Whether requests can name it."""
        return self.adapter is not None


@dataclass(frozen=True)
class Lease:
    """The right to name `adapter` in requests; `waited_s` is how long it took to get it loaded (0 if it was resident)."""

    adapter: LoadedAdapter
    waited_s: float


class Residency:
    """Loads, keeps and evicts adapters: `capacity` of them, and one that is loaded ahead in a slot more."""

    def __init__(
        self,
        engine: Engine,
        memory: HostMemory,
        *,
        base_fingerprint: str,
        capacity: int,
        load_timeout_s: float,
        rates: Rates,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self.base_fingerprint = base_fingerprint
        self.capacity = capacity
        self.claimed: Counter[str] = Counter()  # digests that have or want a slot without a request of admission's
        self.on_change: Callable[[], None] = lambda: None  # called when `claimed` changes
        self.on_full: Callable[[], None] = lambda: None  # called when a version waits for a slot
        self.on_event: Callable[[InEngine], None] = lambda _: None  # told of loads, evictions and quarantines
        self._observer = observer
        self._loader = Loader(engine, memory, load_timeout_s)
        self._slots: SlotTable[Resident] = SlotTable(capacity, rates, memory.expected)
        self._residents = self._slots.held
        self._ahead: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._room = asyncio.Condition()
        self.quarantined: dict[str, str] = {}  # references of versions whose answers were not finite, by digest

    @asynccontextmanager
    async def lease(self, manifest: Manifest, on_stage: OnStage | None = None) -> AsyncIterator[Lease]:
        """Keep the version loaded for the time of the block, loading it first if need be.

        Raises WrongBase, InvalidAdapter (the engine or the probe refuses it), CorruptVersion, RegistryUnavailable, or
        Overloaded when every slot is taken by adapters in use for longer than the load timeout.
        """
        self.check_base(manifest)  # here, as the same bytes may be resident under the name of a version of this base
        self.check_quarantine(manifest)
        started = time.monotonic()
        self._slots.asked(manifest.digest, started)
        ready = self.is_resident(manifest.digest)
        if ready and self._observer:
            self._observer.adapter_found("slot")
        resident, adapter = await self._take(manifest, on_stage)
        try:
            resident.last_used = time.monotonic()
            yield Lease(adapter, 0.0 if ready else time.monotonic() - started)
        finally:
            await self._give_back(resident)

    async def _take(self, manifest: Manifest, on_stage: OnStage | None) -> tuple[Resident, LoadedAdapter]:
        """The version in its slot, used by one more; it is loaded first if need be."""
        while True:
            resident = self._residents.get(manifest.digest) or await self._reserve(manifest)
            resident.in_use += 1
            try:
                return resident, resident.adapter or await self._loaded(resident, on_stage)
            except BaseException as error:
                await self._give_back(resident)
                if not isinstance(error, LoraplexError) or resident.manifest.ref == manifest.ref:
                    raise
                # It was loaded for another name with the same bytes: what became of that says nothing about this one.

    async def _give_back(self, resident: Resident) -> None:
        resident.in_use -= 1
        resident.last_used = time.monotonic()
        await self._leave_if_it_has_to(resident)
        await self._announce_room()

    @contextmanager
    def expected(self, manifest: Manifest | None) -> Iterator[None]:
        """A request for the version waits or runs, for the time of the block: it is prepared meanwhile if it is not loaded."""
        if manifest is None or manifest.base.fingerprint != self.base_fingerprint:
            yield
            return
        with self._memory.expect(manifest, prefetch=manifest.digest not in self._residents):
            yield

    def load_ahead(self, digest: str) -> None:
        """Requests for the version are next to get a slot: have it in the engine by then, in the slot that is one more.

        One at a time, if it is in host memory, and never instead of what other requests wait for.
        """
        manifest = self._memory.manifest(digest)
        if manifest is None or digest in self._residents or digest in self.quarantined:
            return
        if (found := self._free_slot(ahead=True)) is not None:
            resident = self._residents[digest] = Resident(manifest, *found)
            task = asyncio.create_task(self._load_claimed(resident, lambda _stage, _detail: None))
            task.add_done_callback(_retrieve)
            self._ahead = resident.loading = task

    @property
    def _loads_ahead(self) -> bool:
        return self._ahead is not None and not self._ahead.done()

    @asynccontextmanager
    async def warm(self, manifest: Manifest, on_stage: OnStage | None = None) -> AsyncIterator[None]:
        """Load and probe the version, and keep it for the time of the block. Raises as `lease`."""
        with self._claim(manifest.digest):
            async with self.lease(manifest, on_stage):
                yield

    async def preload(self, manifest: Manifest, on_stage: OnStage | None = None) -> None:
        """Load and probe the version, so that its next request does not wait. Raises as `lease`."""
        async with self.warm(manifest, on_stage):
            pass

    @asynccontextmanager
    async def borrow(self, manifest: Manifest) -> AsyncIterator[LoadedAdapter | None]:
        """The version if it is loaded, for the time of the block; that is no reason to keep it loaded afterwards."""
        resident = self._residents.get(manifest.digest)
        if resident is None or resident.adapter is None:
            yield None
            return
        resident.in_use += 1
        try:
            yield resident.adapter
        finally:
            resident.in_use -= 1
            await self._leave_if_it_has_to(resident)
            await self._announce_room()

    @property
    def free_slots(self) -> int:
        """Adapters that could be loaded without evicting one."""
        return self.capacity - len(self._residents)

    def evict_last(self, manifest: Manifest) -> AbstractContextManager[None]:
        """For the time of the block, the version makes way only if nothing else can. It is not loaded for that."""
        return self._slots.last(manifest.digest)

    async def pin(self, manifest: Manifest) -> None:
        """Load the version and keep it until it is unpinned. Raises as `lease`, NotAllowedNow if nothing else fits then."""
        self._check_pin(manifest)
        with self._claim(manifest.digest):
            async with self.lease(manifest):
                self._check_pin(manifest)  # others may have been pinned meanwhile
                resident = self._residents[manifest.digest]
                if not resident.pinned:
                    resident.pinned = True
                    self._change_claim(manifest.digest, 1)

    def _check_pin(self, manifest: Manifest) -> None:
        pinned = sum(resident.pinned for resident in self._residents.values())
        present = self._residents.get(manifest.digest)
        if pinned + 1 >= self.capacity and not (present and present.pinned):
            raise NotAllowedNow(
                f"{pinned} of {self.capacity} slots are pinned and one must stay free",
                fix="Unpin another version, or raise --max-resident.",
            )

    async def unpin(self, manifest: Manifest) -> None:
        """Let the version be evicted again when its turn comes."""
        if resident := self._residents.get(manifest.digest):
            self._unpin(resident)
            await self._announce_room()

    async def unload(self, manifest: Manifest) -> bool:
        """Take the version out of the engine; returns whether it was in. Raises NotAllowedNow while requests use it."""
        async with self._room:
            resident = self._residents.get(manifest.digest)
            if resident is None:
                return False
            if resident.in_use or resident.adapter is None:
                raise NotAllowedNow(
                    f"{manifest.ref} is in use by {resident.in_use} requests",
                    fix="Wait for them to finish, then try again.",
                )
            self._unpin(resident)
            adapter = self._evict(resident)
            self._room.notify_all()
            await self._engine.unload_adapter(adapter)
            return True

    def quarantine(self, manifest: Manifest) -> None:
        """Serve the version no more; it leaves the engine with its last request. Its cached prefixes are its own."""
        self.quarantined[manifest.digest] = manifest.ref
        log.error("adapter quarantined: its answer is not a number", adapter=manifest.ref, digest=manifest.digest)
        self.on_event(InEngine("quarantined", manifest))
        if resident := self._residents.get(manifest.digest):
            self._unpin(resident)

    async def follow(self, catalog: Catalog) -> NoReturn:
        """Let go of versions that are deleted from the registry, pinned ones too, whoever deletes them."""
        while True:
            try:
                with catalog.subscribe() as events:
                    for held in self.residents():  # of which some may have been deleted before
                        await self._let_go(held, catalog)
                    async for event in events:
                        if isinstance(event, Deleted) and (resident := self.find(event.name, event.version)):
                            await self._let_go(resident, catalog)
            except Overloaded:
                continue  # so many at once that some went by

    async def _let_go(self, resident: Resident, catalog: Catalog) -> None:
        digest = resident.manifest.digest
        if any(other.digest == digest for view in catalog.adapters.values() for other in view.manifests.values()):
            return  # it is there, or the same bytes under another name, which may be what was pinned
        resident.deleted = True
        self._unpin(resident)
        await self._leave_if_it_has_to(resident)
        await self._announce_room()

    def check_base(self, manifest: Manifest) -> None:
        """Raise WrongBase if the version was trained on another base."""
        if manifest.base.fingerprint != self.base_fingerprint:
            raise WrongBase(manifest.ref, manifest.base.fingerprint, self.base_fingerprint)

    def check_quarantine(self, manifest: Manifest) -> None:
        """Raise Quarantined if the version is."""
        if manifest.digest in self.quarantined:
            raise Quarantined(manifest.ref)

    async def _leave_if_it_has_to(self, resident: Resident) -> None:
        if not resident.deleted and resident.manifest.digest not in self.quarantined:
            return
        async with self._room:
            if resident.evictable and self._residents.get(resident.manifest.digest) is resident:
                await self._engine.unload_adapter(self._evict(resident))

    async def recheck(self, adapter: LoadedAdapter) -> None:
        """Before an adapter is loaded into a restarted engine: see that its files are still what was published.

        Raises RegistryUnavailable when that takes too long: everybody, the base's callers too, waits for the engine.
        """
        if resident := self._holder(adapter):
            async with self._loader.in_time(resident.manifest):
                await self._memory.recheck(resident.manifest)

    def forget(self, adapter: LoadedAdapter) -> None:
        """The adapter is not in the engine any more: its next request loads it anew, under another id."""
        if resident := self._holder(adapter):
            self._unpin(resident)
            del self._residents[resident.manifest.digest]
            self.on_event(InEngine("evicted", resident.manifest))
            self._telling = asyncio.create_task(self._announce_room())  # a restart does not wait for the lock

    def _holder(self, adapter: LoadedAdapter) -> Resident | None:
        return next((resident for resident in self._residents.values() if resident.adapter == adapter), None)

    def is_resident(self, digest: str) -> bool:
        """Whether the version is in the engine and ready."""
        return self._slots.is_ready(digest)

    def find(self, name: str, version: str) -> Resident | None:
        """The version if it is in the engine or on its way there, though it may be deleted."""
        held = self._residents.values()
        return next((one for one in held if (one.manifest.name, one.manifest.version) == (name, version)), None)

    def residents(self) -> list[Resident]:
        """What is loaded now, by name and version."""
        loaded = [resident for resident in self._residents.values() if resident.adapter]
        return sorted(loaded, key=lambda r: (r.manifest.name, r.manifest.number))

    async def _reserve(self, manifest: Manifest) -> Resident:
        """A slot for the version, evicting another one if need be."""
        try:
            async with asyncio.timeout(self._loader.timeout_s), self._room:
                while True:
                    if present := self._residents.get(manifest.digest):
                        return present
                    if (found := self._free_slot()) is not None:
                        resident = self._residents[manifest.digest] = Resident(manifest, *found)
                        return resident
                    self.on_full()
                    await self._room.wait()
        except TimeoutError as error:
            raise Overloaded(self.capacity, "adapters are in use", retry_after_s=5.0) from error

    async def _loaded(self, resident: Resident, on_stage: OnStage | None) -> LoadedAdapter:
        """Wait for the one load of this version that is under way, starting it if there is none."""
        if resident.loading is None:
            resident.loading = asyncio.create_task(self._load(resident, on_stage or (lambda _stage, _detail: None)))
            resident.loading.add_done_callback(_retrieve)
        await asyncio.shield(resident.loading)  # a caller that leaves must not take the others' load with it
        if resident.adapter is None:
            raise NotAllowedNow(f"{resident.manifest.ref} was unloaded meanwhile", fix="Try again.")
        return resident.adapter

    async def _load(self, resident: Resident, on_stage: OnStage) -> None:
        with self._claim(resident.manifest.digest):  # the load goes on even if everybody who waits for it leaves
            await self._load_claimed(resident, on_stage)

    async def _load_claimed(self, resident: Resident, on_stage: OnStage) -> None:
        manifest = resident.manifest
        started = time.monotonic()
        load = self._loader.begin(manifest, resident.replaces)
        try:
            adapter = await load.run(on_stage)
        except BaseException:
            self._residents.pop(manifest.digest, None)
            try:
                await load.undo()
            finally:
                await self._announce_room()
            raise
        resident.adapter = adapter
        seconds = time.monotonic() - started
        log.info(
            "adapter loaded", adapter=manifest.ref, digest=manifest.digest, tier=load.tier, seconds=round(seconds, 3)
        )
        self.on_event(InEngine("loaded", manifest, seconds))
        if self._observer:
            self._observer.adapter_found(load.tier)
            self._observer.adapter_loaded(seconds, load.tier)

    def _free_slot(self, *, ahead: bool = False) -> tuple[LoadedAdapter | None] | None:
        """A slot, and who is still in it; None while none may go. The engine forgets it when its successor comes."""
        found = self._slots.find(time.monotonic(), ahead=ahead, under_way=self._loads_ahead)
        if found is None:
            return None
        (digest,) = found
        return (self._evict(self._residents[digest]) if digest else None,)

    def _evict(self, resident: Resident) -> LoadedAdapter:
        """From now on no request can lease it; the engine has yet to forget it."""
        adapter = resident.adapter
        if adapter is None:
            raise RuntimeError(f"{resident.manifest.ref} is not in the engine yet")
        del self._residents[resident.manifest.digest]
        log.info("adapter evicted", adapter=resident.manifest.ref)
        self.on_event(InEngine("evicted", resident.manifest))
        if self._observer:
            self._observer.adapter_evicted("slot")
        return adapter

    @contextmanager
    def _claim(self, digest: str) -> Iterator[None]:
        """For the time of the block, have admission leave a slot for the version."""
        self._change_claim(digest, 1)
        try:
            yield
        finally:
            self._change_claim(digest, -1)

    def _change_claim(self, digest: str, change: int) -> None:
        self.claimed[digest] += change
        if not self.claimed[digest]:
            del self.claimed[digest]
        self.on_change()

    def _unpin(self, resident: Resident) -> None:
        if resident.pinned:
            resident.pinned = False
            self._change_claim(resident.manifest.digest, -1)

    async def _announce_room(self) -> None:
        async with self._room:
            self._room.notify_all()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Take the load's error, so that asyncio does not report it as lost when every caller has left."""
    if not task.cancelled():
        task.exception()
