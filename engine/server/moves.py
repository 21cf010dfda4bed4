"""Warm, then switch: the one way in which an alias comes to name another version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from engine.registry.catalog import Catalog
from engine.registry.manifest import AliasChange
from engine.registry.names import AdapterRef
from engine.runtime.residency import OnStage, Residency


class Moves:
    """Moves aliases of the catalog's adapters."""

    def __init__(self, catalog: Catalog, residency: Residency) -> None:
        self._catalog = catalog
        self._residency = residency

    async def move(
        self, name: str, alias: str, version: str, switch: Callable[[], Awaitable[AliasChange]], report: OnStage
    ) -> AliasChange:
        """Load and probe the version, then `switch` to it. Raises what either raises; then nothing has moved."""
        manifest = self._catalog.resolve(AdapterRef(name, version))
        async with AsyncExitStack() as stack:
            view = self._catalog.adapter(name)
            if before := view.manifests.get(view.aliases.get(alias, "")):
                await self._residency.hold(before, stack)  # warming must not evict what a rollback would need
            await self._residency.preload(manifest, report)
            report("switching", f"{name}@{alias} to {version}")
            change = await switch()
        await self._catalog.refresh()
        return change
