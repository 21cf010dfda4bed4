"""Warm, then switch: the one way in which an alias comes to name another version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext

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
        """Load and probe the version, then `switch` to it. Raises what either raises; then nothing has moved.

        The version is kept until requests are sent to it: `switch` takes its time, and one that is loaded and idle would go
        first. The alias's version before it only goes last: if moves held two slots each, they would wait for each other.
        """
        manifest = self._catalog.resolve(AdapterRef(name, version))
        view = self._catalog.adapter(name)
        before = view.manifests.get(view.aliases.get(alias, ""))
        # Warming must not evict what a rollback would need.
        with self._residency.evict_last(before) if before else nullcontext():
            async with self._residency.warm(manifest, report):
                report("switching", f"{name}@{alias} to {version}")
                change = await switch()
                await self._catalog.refresh()
        return change
