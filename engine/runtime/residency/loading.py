"""What it takes to have one version in the engine: prepared in host memory, copied into a slot, confirmed, probed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from engine.errors import RegistryUnavailable
from engine.registry.manifest import Manifest
from engine.runtime.engine import Engine, LoadedAdapter
from engine.runtime.probe import Probe
from engine.runtime.residency.memory import HostMemory, Prepared, Tier

OnStage = Callable[[str, str], None]  # told (stage, sentence) while an adapter is being loaded


class Loader:
    """Loads versions, each under an id and a name that no other load ever had."""

    def __init__(self, engine: Engine, memory: HostMemory, timeout_s: float) -> None:
        self.engine = engine
        self._memory = memory
        self.timeout_s = timeout_s
        self._probe = Probe(engine)
        self._probed: set[str] = set()  # digests; what is in a version never changes, so once is enough
        self._ids = itertools.count(1)  # never reused: the engine answers by this id, whatever the name says

    def begin(self, manifest: Manifest, replaced: LoadedAdapter | None) -> Load:
        """A load of the version, in the slot of `replaced`, which is still in the engine."""
        return Load(self, manifest, replaced)

    def name(self, manifest: Manifest, prepared: Prepared) -> LoadedAdapter:
        """The version as the engine is to know it."""
        name = f"{manifest.ref}#{manifest.digest.removeprefix('sha256:')[:16]}"
        return LoadedAdapter(next(self._ids), name, prepared.folder, manifest.rank, prepared.file)

    async def prepare(self, manifest: Manifest, stack: AsyncExitStack) -> Prepared:
        """The version in host memory, kept there until `stack` closes. Raises RegistryUnavailable, CorruptVersion."""
        async with self.in_time(manifest):
            return await stack.enter_async_context(self._memory.hold(manifest))

    @asynccontextmanager
    async def in_time(self, manifest: Manifest) -> AsyncIterator[None]:
        """Have the version's files within the load timeout; raises RegistryUnavailable."""
        try:
            async with asyncio.timeout(self.timeout_s):
                yield
        except TimeoutError as error:
            raise RegistryUnavailable(f"fetching {manifest.ref}", "it took too long") from error

    async def check_effect(self, manifest: Manifest, adapter: LoadedAdapter, on_stage: OnStage) -> None:
        """Probe the version when it is loaded for the first time. Raises InvalidAdapter."""
        if manifest.digest in self._probed:
            return
        on_stage("probing", f"checking that {manifest.ref} changes the answers")
        await self._probe.check(adapter)
        self._probed.add(manifest.digest)


class Load:
    """One load; after one that failed, `undo` leaves nothing of it in the engine."""

    def __init__(self, loader: Loader, manifest: Manifest, replaced: LoadedAdapter | None) -> None:
        self._loader = loader
        self._manifest = manifest
        self._replaced = replaced
        self._adapter: LoadedAdapter | None = None
        self.tier: Tier = "registry"  # that had the files

    async def run(self, on_stage: OnStage) -> LoadedAdapter:
        """Load and probe. Raises InvalidAdapter (the engine or the probe refuses it), CorruptVersion, RegistryUnavailable."""
        manifest, loader = self._manifest, self._loader
        on_stage("loading", f"fetching {manifest.ref}")
        async with AsyncExitStack() as stack:
            prepared = await loader.prepare(manifest, stack)
            self.tier = prepared.tier
            adapter = self._adapter = loader.name(manifest, prepared)
            on_stage("loading", f"loading {manifest.ref} into the engine")
            replaced, self._replaced = self._replaced, None
            await loader.engine.load_adapter(adapter, replaced)
        await loader.check_effect(manifest, adapter, on_stage)
        return adapter

    async def undo(self) -> None:
        """Take out what was loaded, and what it was to replace: nobody holds its slot any more."""
        for left in filter(None, (self._adapter, self._replaced)):
            await self._loader.engine.unload_adapter(left)
