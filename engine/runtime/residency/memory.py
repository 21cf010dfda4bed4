"""The tier between the disk and the slots: adapters in host memory, prepared so that the engine has only to copy them.

An adapter's files are read once, and what was read is what is hashed and converted: in a thread beside the event loop, not in
the engine's process. The result is a file in memory that both processes map.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine.errors import CorruptVersion, RegistryUnavailable
from engine.registry.cache import LocalCopies, shared
from engine.registry.manifest import Manifest
from engine.registry.store import reason_of
from engine.registry.worth import Rates

Tier = Literal["slot", "memory", "disk", "registry"]
Prepare = Callable[[Mapping[str, bytes], Path], None]
_SHARED = Path("/dev/shm")  # noqa: S108 - a folder of our own below it
_PREFIX = "loraplex-"
_AT_ONCE = 2  # preparations; each takes a core for some tens of milliseconds


@dataclass(frozen=True)
class Prepared:
    """A prepared adapter: its file, the folder with what was published, and the tier that had it."""

    file: Path
    folder: Path
    tier: Tier


@dataclass
class _Copy:
    """A prepared adapter in memory; getting it took `cost_s`."""

    prepared: Prepared
    manifest: Manifest
    size: int
    cost_s: float


class HostMemory:
    """Prepared adapters, at most `limit_bytes` of them and whatever is in use beyond that."""

    def __init__(
        self,
        copies: LocalCopies,
        prepare: Prepare,
        folder: Path,
        limit_bytes: int,
        rates: Rates,
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._copies = copies
        self._prepare = prepare
        self._folder = folder
        self._limit = limit_bytes
        self._rates = rates
        self._on_evict = on_evict
        self._held: dict[str, _Copy] = {}  # by digest
        self.expected: Counter[str] = Counter()  # digests that requests are there for
        self._in_use: Counter[str] = Counter()
        self._under_way: dict[str, asyncio.Task[Prepared]] = {}
        self._turn = asyncio.Semaphore(_AT_ONCE)

    @property
    def bytes(self) -> int:
        """What all copies take."""
        return sum(copy.size for copy in self._held.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def manifest(self, digest: str) -> Manifest | None:
        """The version with this digest, if it is in memory."""
        held = self._held.get(digest)
        return held.manifest if held else None

    @asynccontextmanager
    async def hold(self, manifest: Manifest) -> AsyncIterator[Prepared]:
        """Keep the version in memory for the time of the block, getting it there first if need be.

        Callers for one version share the work. Raises CorruptVersion, RegistryUnavailable (no room included) or InvalidAdapter.
        """
        digest = manifest.digest
        self._in_use[digest] += 1
        try:
            held = self._held.get(digest)
            if held:
                yield replace(held.prepared, tier="memory")
            else:
                yield await shared(manifest.ref, lambda: self.prefetch(manifest))
        finally:
            self._in_use[digest] -= 1
            if not self._in_use[digest]:
                del self._in_use[digest]
            self._make_room()

    @contextmanager
    def expect(self, manifest: Manifest, *, prefetch: bool) -> Iterator[None]:
        """A request for the version is there, for the time of the block: have it ready, unless others need the room too."""
        digest = manifest.digest
        self.expected[digest] += 1
        try:
            if prefetch and digest not in self._held and self._has_room(manifest.size_bytes):
                self.prefetch(manifest)
            yield
        finally:
            self.expected[digest] -= 1
            if not self.expected[digest]:
                del self.expected[digest]

    def _has_room(self, size: int) -> bool:
        needed = (copy.size for digest, copy in self._held.items() if digest in self.expected or digest in self._in_use)
        return sum(needed) + size * (1 + len(self._under_way)) <= self._limit

    def prefetch(self, manifest: Manifest) -> asyncio.Task[Prepared]:
        """Get the version into memory, now or as soon as others are there."""
        digest = manifest.digest
        task = self._under_way.get(digest)
        if task is None:
            task = self._under_way[digest] = asyncio.create_task(self._get(manifest), name=manifest.ref)
            task.add_done_callback(lambda done: self._forget(digest, done))
        return task

    async def recheck(self, manifest: Manifest) -> None:
        """Read, prove and prepare the version anew, although it was right before. Raises as `hold`."""
        if (held := self._held.pop(manifest.digest, None)) is not None:
            await asyncio.to_thread(held.prepared.file.unlink, missing_ok=True)
        await self._copies.recheck(manifest)
        async with self.hold(manifest):
            pass

    def _forget(self, digest: str, done: asyncio.Task[Prepared]) -> None:
        self._under_way.pop(digest, None)
        if not done.cancelled():
            done.exception()  # whoever wanted it may have left, and nobody prefetched for is there yet

    async def _get(self, manifest: Manifest) -> Prepared:
        if held := self._held.get(manifest.digest):
            return held.prepared
        try:
            copy = await self._prepared(manifest)
        except OSError as error:
            raise RegistryUnavailable(f"preparing {manifest.ref}", reason_of(error)) from error
        self._held[manifest.digest] = copy
        self._make_room()
        return copy.prepared

    async def _prepared(self, manifest: Manifest) -> _Copy:
        tier: Tier = "disk" if manifest.digest in self._copies else "registry"
        target = self._folder / manifest.digest.removeprefix("sha256:")
        began = time.monotonic()
        async with self._copies.hold(manifest) as folder:
            fetched_s = time.monotonic() - began
            try:
                written_s = await self._written(manifest, folder, target)
            except (CorruptVersion, FileNotFoundError):  # damaged or deleted since it was checked: once more
                folder = await self._copies.recheck(manifest)
                written_s = await self._written(manifest, folder, target)
        size = target.stat().st_size
        return _Copy(Prepared(target, folder, tier), manifest, size, cost_s=fetched_s + written_s)

    async def _written(self, manifest: Manifest, folder: Path, target: Path) -> float:
        """Write the prepared file when it is its turn, which no download holds up; returns the seconds without the wait."""
        async with self._turn:
            began = time.monotonic()
            await asyncio.to_thread(self._write, manifest, folder, target)
            return time.monotonic() - began

    def _write(self, manifest: Manifest, folder: Path, target: Path) -> None:
        """Read every file, prove that it is what was published, and write the prepared one; whole or not at all."""
        files = {}
        for entry in manifest.files:
            content = files[entry.path] = (folder / entry.path).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise CorruptVersion(manifest.ref, f"the local copy of {entry.path} is not what was published")
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".part")
        try:
            self._prepare(files, unfinished)
            unfinished.rename(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Take out what is worth least until the rest fits; what is in use stays."""
        now = time.monotonic()
        excess = self.bytes - self._limit
        idle = [digest for digest in self._held if digest not in self._in_use] if excess > 0 else []
        idle.sort(key=lambda digest: (digest in self.expected, self._worth(digest, now)))
        for digest in idle:
            if excess <= 0:
                return
            copy = self._held.pop(digest)
            copy.prepared.file.unlink(missing_ok=True)
            excess -= copy.size
            self._on_evict()

    def _worth(self, digest: str, now: float) -> float:
        copy = self._held[digest]
        return self._rates.worth(digest, now, cost=copy.cost_s, size=max(1, copy.size))


def shared_folder(beside: Path, limit_bytes: int) -> Path:
    """A new folder for prepared adapters: in the machine's memory if that much fits, else on disk at `beside`.

    Folders of processes that are gone are deleted.
    """
    root = beside
    if _SHARED.is_dir() and os.access(_SHARED, os.W_OK) and shutil.disk_usage(_SHARED).free >= limit_bytes:
        root = _SHARED
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
