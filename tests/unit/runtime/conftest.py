"""A registry with adapters for a tiny base, and the runtime's parts around a fake engine."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.client.testing import write_adapter, write_base
from engine.registry.cache import LocalCopies
from engine.registry.catalog import Catalog
from engine.registry.checks import Limits, check_adapter
from engine.registry.fingerprint import read_base
from engine.registry.manifest import Manifest
from engine.registry.registry import Registry
from engine.registry.store import Store
from engine.registry.worth import Rates
from engine.runtime.admission import Admission, Rules
from engine.runtime.allowance import Allowances, unlimited
from engine.runtime.engine import LoadedAdapter
from engine.runtime.fake import FakeEngine
from engine.runtime.generator import Generator
from engine.runtime.requests import GenerationRequest
from engine.runtime.residency import HostMemory, Residency, Tier


class CountingEngine(FakeEngine):
    """A fake engine that writes down what is loaded and unloaded, and can be told to be slow or to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[LoadedAdapter] = []
        self.unloads: list[LoadedAdapter] = []
        self.most_loaded = 0
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.failure: Exception | None = None

    async def load_adapter(self, adapter: LoadedAdapter, replaced: LoadedAdapter | None = None) -> None:
        """Load, once it may."""
        self.loads.append(adapter)
        if replaced:
            self.unloads.append(replaced)
            self.loaded.pop(replaced.id)
        await self.may_load.wait()
        if self.failure:
            raise self.failure
        await super().load_adapter(adapter)
        self.most_loaded = max(self.most_loaded, len(self.loaded))

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Unload."""
        self.unloads.append(adapter)
        await super().unload_adapter(adapter)


class Counter:
    """Counts what residency reports."""

    def __init__(self) -> None:
        self.loaded = 0
        self.evicted = 0
        self.found: collections.Counter[Tier] = collections.Counter()

    def adapter_found(self, tier: Tier) -> None:
        """One more there."""
        self.found[tier] += 1

    def adapter_loaded(self, seconds: float, tier: Tier) -> None:
        """One more."""
        assert seconds >= 0
        assert tier != "slot"
        self.loaded += 1

    def adapter_evicted(self, tier: Tier) -> None:
        """One more."""
        assert tier == "slot"
        self.evicted += 1


class World:
    """One machine: a registry, an engine, and everything between them."""

    def __init__(self, folder: Path, engine: FakeEngine) -> None:
        self.folder = folder
        self.engine = engine
        write_base(folder / "base")
        self.base = read_base(folder / "base")
        self.registry = Registry(Store.open("memory://"))
        self.catalog = Catalog(self.registry)
        self.copies = LocalCopies(folder / "copies", self.registry)
        self.counter = Counter()
        self.rates = Rates()
        self._made = 0

    def memory(self, limit_bytes: int = 10**9) -> HostMemory:
        """The tier above the local copies."""
        return HostMemory(self.copies, self.engine.prepare, self.folder / "prepared", limit_bytes, self.rates)

    def residency(self, capacity: int = 2, load_timeout_s: float = 5.0, fingerprint: str = "") -> Residency:
        """A residency for `capacity` adapters."""
        return Residency(
            self.engine,
            self.memory(),
            base_fingerprint=fingerprint or self.base.fingerprint,
            capacity=capacity,
            load_timeout_s=load_timeout_s,
            rates=self.rates,
            observer=self.counter,
        )

    def generator(self, max_running: int = 4, max_waiting: int = 4, allowances: Allowances = unlimited) -> Generator:
        """A generator with a residency of its own."""
        admission = Admission(Rules(max_running, max_waiting))
        return Generator(self.engine, self.catalog, admission, self.residency(), allowances=allowances)

    async def publish(self, name: str, seed: int | None = None) -> Manifest:
        """Publish another version of `name`; versions of one seed have the same bytes."""
        self._made += 1
        folder = self.folder / f"adapter-{self._made}"
        write_adapter(folder, seed=self._made if seed is None else seed)
        checked = check_adapter(folder, self.base, Limits(max_rank=8, max_bytes=10**6))
        manifest = await self.registry.publish(folder, checked, name=name)
        await self.catalog.refresh()
        return manifest


@pytest.fixture
async def engine() -> CountingEngine:
    """A fake engine that counts."""
    return CountingEngine()


@pytest.fixture
async def world(tmp_path: Path, engine: CountingEngine) -> World:
    """An empty world."""
    return World(tmp_path, engine)


@pytest.fixture
async def three(world: World) -> list[Manifest]:
    """One version each of three adapters: a, b, c."""
    return [await world.publish(name) for name in "abc"]


async def text_of(generator: Generator, request: GenerationRequest) -> str:
    """The whole text of an answer."""
    async with generator.answer(request) as (_, deltas):
        return "".join([delta.text async for delta in deltas])


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; fails after three seconds."""
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.005)
