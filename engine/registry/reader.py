"""Reading the registry: what is published, what each alias names, and the files themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import AdapterNotFound, CorruptVersion
from engine.registry.aliases import aliases_now, select_version, version_before
from engine.registry.layout import (
    MANIFEST,
    ROOT,
    Inventory,
    adapter_folder,
    alias_file,
    evaluations_folder,
    take_inventory,
    tombstone_file,
    version_file,
)
from engine.registry.manifest import AliasChange, FileEntry, Manifest, decode_change, decode_manifest
from engine.registry.names import AdapterRef, check_name, check_version, nearest, nearest_versions
from engine.registry.store import Missing, Oversized, Store

T = TypeVar("T")

_READS_AT_ONCE = 16


class Reader:
    """The part of the registry that changes nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def survey(self) -> dict[str, Inventory]:
        """List the whole registry once: which versions, alias moves and tombstones there are, by adapter."""
        return take_inventory(await self._store.list(ROOT))

    async def list_names(self) -> list[str]:
        """Return the names of all adapters that have a version."""
        return sorted(name for name, inventory in (await self.survey()).items() if inventory.published)

    async def versions(self, name: str) -> list[str]:
        """Return the adapter's versions, oldest first; none when there is no such adapter."""
        return [f"v{number}" for number in (await self._inventory(name)).published]

    async def manifest(self, name: str, version: str) -> Manifest:
        """Read one version's manifest; raises AdapterNotFound, or CorruptVersion when it is damaged."""
        check_name(name)
        check_version(version)
        manifest = await self._published(name, version)
        if manifest is None:
            found = nearest_versions(version, await self.versions(name))
            raise AdapterNotFound(f"{name}@{version}", [f"{name}@{other}" for other in found], "version")
        return manifest

    async def manifests(self, name: str) -> list[Manifest]:
        """Read all of an adapter's manifests, oldest first."""
        return await read_all(self.manifest(name, version) for version in await self.versions(name))

    async def history(self, name: str) -> list[AliasChange]:
        """Return every alias move so far, oldest first."""
        return await self.moves(name, (await self._inventory(name)).moves)

    async def moves(self, name: str, numbers: Iterable[int]) -> list[AliasChange]:
        """Read the alias moves of these numbers, oldest first."""
        return await read_all(self._move(name, number) for number in sorted(numbers))

    async def aliases(self, name: str) -> dict[str, str]:
        """Return which version each alias names."""
        return aliases_now(await self.history(name))

    async def resolve(self, ref: AdapterRef) -> Manifest:
        """Return the version that `ref` names now; raises AdapterNotFound with the nearest names that do exist."""
        versions = await self.versions(ref.name)
        if not versions:
            raise AdapterNotFound(ref.name, nearest(ref.name, await self.list_names()))
        version = select_version(ref, versions, await self.aliases(ref.name))
        return await self.manifest(ref.name, version)

    async def rollback_target(self, name: str, alias: str) -> str:
        """Return the version that the alias named before its present one; raises NotAllowedNow when there is none."""
        return version_before(name, alias, await self.history(name), await self.versions(name))

    async def evaluations(self, name: str, version: str) -> list[dict[str, Any]]:
        """Return what evaluations of a version found, oldest first; raises CorruptVersion when one is damaged."""
        await self.manifest(name, version)
        paths = sorted(await self._store.list(evaluations_folder(name, version)))
        return await read_all(self._evaluation(f"{name}@{version}", path) for path in paths)

    async def _evaluation(self, ref: str, path: str) -> dict[str, Any]:
        try:
            record = json.loads(await self._store.get(path))
        except ValueError as error:
            raise CorruptVersion(ref, "one of its evaluations is not readable") from error
        return dict(record)

    async def fetch(self, manifest: Manifest, target: Path) -> None:
        """Copy a version's files into the empty folder `target`; raises CorruptVersion unless every byte is right."""
        if await asyncio.to_thread(lambda: any(target.iterdir())):
            raise ValueError("the folder to fetch into is not empty")
        for file in manifest.files:
            await self._fetch_file(manifest, file, target / file.path)

    async def _inventory(self, name: str) -> Inventory:
        check_name(name)
        found = take_inventory(await self._store.list(adapter_folder(name)))
        return found.get(name, Inventory())

    async def _published(self, name: str, version: str) -> Manifest | None:
        if await self._exists(tombstone_file(name, version)):
            return None
        try:
            data = await self._store.get(version_file(name, version, MANIFEST))
        except Missing:
            return None
        return decode_manifest(data, name, version)

    async def _exists(self, path: str) -> bool:
        try:
            await self._store.get(path)
        except Missing:
            return False
        return True

    async def _move(self, name: str, number: int) -> AliasChange:
        try:
            data = await self._store.get(alias_file(name, number))
        except Missing as error:
            raise CorruptVersion(name, f"alias move {number} is missing") from error
        return decode_change(data, name, number)

    async def _fetch_file(self, manifest: Manifest, file: FileEntry, target: Path) -> None:
        path = version_file(manifest.name, manifest.version, file.path)
        try:
            size, digest = await self._store.download(path, target, limit=file.size_bytes)
        except Missing as error:
            if await self._exists(tombstone_file(manifest.name, manifest.version)):
                raise AdapterNotFound(manifest.ref, [], "version") from error
            raise CorruptVersion(manifest.ref, f"{file.path} is missing") from error
        except Oversized as error:
            raise CorruptVersion(manifest.ref, f"{file.path} is longer than published") from error
        if (size, digest) != (file.size_bytes, file.sha256):
            raise CorruptVersion(manifest.ref, f"{file.path} is not what was published")


async def read_all(reads: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run reads side by side, a bounded number at a time."""
    places = asyncio.Semaphore(_READS_AT_ONCE)

    async def one(read: Coroutine[Any, Any, T]) -> T:
        async with places:
            return await read

    begun = list(reads)
    tasks = [asyncio.create_task(one(read)) for read in begun]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for read in begun:
            read.close()  # Python warns of one that was never awaited, because the reader has left
