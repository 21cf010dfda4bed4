"""Local copies of versions, named by their digest and verified: the only files that the engine ever loads.

Together they take at most so much room; what is worth least (registry/worth.py) makes way, never what is in use.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from engine.errors import LoraplexError, RegistryUnavailable
from engine.registry.manifest import FileEntry, Manifest
from engine.registry.reader import Reader
from engine.registry.signatures import verify
from engine.registry.store import reason_of
from engine.registry.worth import Rates

T = TypeVar("T")

_TEMPORARY = ".tmp-"
_CHECKS = 2  # at once; each reads and hashes, which keeps a core busy
_DOWNLOADS = 8  # at once; one that hangs keeps its place, but nobody from a copy that is there already


class LocalCopies:
    """A folder of verified copies, `root`/<digest>. Engines may share it: a copy appears whole or not at all.

    `limit_bytes` None is no limit. What it holds of other processes', or of earlier days, is the first to make way.
    """

    def __init__(
        self,
        root: Path,
        registry: Reader,
        signed_by: Path | None = None,
        limit_bytes: int | None = None,
        rates: Rates | None = None,
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._root = root.resolve()
        self._registry = registry
        self._signed_by = signed_by
        self._limit = limit_bytes
        self._rates = rates or Rates()
        self._on_evict = on_evict
        self._verified: set[str] = set()
        self._under_way: dict[str, asyncio.Task[Path]] = {}
        self._in_use: Counter[str] = Counter()
        self._checks = asyncio.Semaphore(_CHECKS)
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._coming: dict[str, int] = {}  # bytes that are being downloaded, by digest
        _sweep(self._root)

    def __contains__(self, digest: str) -> bool:
        return self._folder(digest).is_dir()

    @asynccontextmanager
    async def hold(self, manifest: Manifest) -> AsyncIterator[Path]:
        """As `get`, and the copy stays for the time of the block."""
        self._in_use[manifest.digest] += 1
        try:
            yield await self.get(manifest)
        finally:
            self._in_use[manifest.digest] -= 1
            if not self._in_use[manifest.digest]:
                del self._in_use[manifest.digest]

    async def get(self, manifest: Manifest) -> Path:
        """Return the absolute folder with the version's files, downloading or repairing it first if need be.

        Callers for one digest share one download. Raises CorruptVersion, RegistryUnavailable (a full disk included), Unsigned.
        """
        return await shared(manifest.ref, lambda: self._under_way.get(manifest.digest) or self._start(manifest))

    def _start(self, manifest: Manifest) -> asyncio.Task[Path]:
        task = asyncio.create_task(self._provide(manifest), name=manifest.ref)
        self._under_way[manifest.digest] = task
        task.add_done_callback(lambda done: self._forget(manifest.digest, done))
        return task

    async def recheck(self, manifest: Manifest) -> Path:
        """As `get`, but read every byte again, although it was right before."""
        self._verified.discard(manifest.digest)
        return await self.get(manifest)

    async def remove(self, digest: str) -> None:
        """Delete the copy of this digest, if there is one."""
        if task := self._under_way.get(digest):
            await asyncio.wait([task])
        self._verified.discard(digest)
        await _in_thread("removing a local copy", lambda: self._discard(self._folder(digest)))

    def _folder(self, digest: str) -> Path:
        return self._root / digest.removeprefix("sha256:")

    def _forget(self, digest: str, done: asyncio.Task[Path]) -> None:
        self._under_way.pop(digest, None)
        if not done.cancelled():
            done.exception()  # every caller may have given up; asyncio complains about errors that nobody looked at

    async def _provide(self, manifest: Manifest) -> Path:
        folder = self._folder(manifest.digest)
        if manifest.digest in self._verified and await asyncio.to_thread(folder.is_dir):
            return folder
        async with self._checks:
            whole = await _in_thread("checking a local copy", lambda: _is_whole(folder, manifest.files))
        if not whole:
            async with self._downloads:
                await self._replace(manifest, folder)
        if self._signed_by:
            await asyncio.to_thread(verify, folder, self._signed_by, manifest.ref)
        self._verified.add(manifest.digest)
        return folder

    async def _replace(self, manifest: Manifest, folder: Path) -> None:
        self._coming[manifest.digest] = manifest.size_bytes
        try:
            await self._make_room()
            await self._download(manifest, folder)
        finally:
            del self._coming[manifest.digest]

    async def _make_room(self) -> None:
        """Delete what is worth least until all that is coming fits; if the rest is in use, it gets its room all the same."""
        if self._limit is None:
            return
        coming = dict(self._coming)  # as of before the look, so that what arrives meanwhile is counted, and once
        sizes = await _in_thread("looking for room", self._sizes)
        excess = sum((coming | sizes).values()) - self._limit
        now = time.monotonic()
        for digest in sorted(sizes, key=lambda each: self._rates.worth(each, now)):  # cost and size go hand in hand
            if excess <= 0:
                return
            if digest in self._in_use or digest in self._under_way:
                continue
            await self.remove(digest)
            excess -= sizes[digest]
            self._on_evict()

    def _sizes(self) -> dict[str, int]:
        """Bytes of each copy, by digest."""
        if not self._root.is_dir():
            return {}
        sizes = {}
        for folder in self._root.iterdir():
            with suppress(FileNotFoundError):  # another process has just deleted it
                if not folder.name.startswith("."):
                    sizes[f"sha256:{folder.name}"] = sum(file.stat().st_size for file in folder.iterdir())
        return sizes

    async def _download(self, manifest: Manifest, folder: Path) -> None:
        temporary = await _in_thread("making a local copy", self._temporary)
        try:
            await self._registry.fetch(manifest, temporary)
            await _in_thread("making a local copy", lambda: self._put_in_place(temporary, folder, manifest))
        finally:
            await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)

    def _temporary(self) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-", dir=self._root))

    def _put_in_place(self, temporary: Path, folder: Path, manifest: Manifest) -> None:
        self._discard(folder)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            # Another engine on this machine was faster; its copy is as good as ours if it is whole.
            if not _is_whole(folder, manifest.files):
                raise

    def _discard(self, folder: Path) -> None:
        """Rename, then delete: nobody ever sees half a copy under a digest."""
        if folder.exists():
            doomed = self._temporary()
            folder.rename(doomed / "copy")
            shutil.rmtree(doomed, ignore_errors=True)


async def shared(ref: str, work: Callable[[], asyncio.Task[T]]) -> T:
    """The result of the task that `work` gives, which others wait for too and which is named after the version it is for."""
    while True:
        task = work()
        try:
            return await asyncio.shield(task)  # a caller that gives up must not take it from the others
        except LoraplexError:
            if task.get_name() == ref:
                raise
            # It was for another name with the same bytes: what became of those files says nothing about these.


def _is_whole(folder: Path, files: tuple[FileEntry, ...]) -> bool:
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {file.path for file in files}:
        return False
    return all(_is_as_published(folder / file.path, file) for file in files)


def _is_as_published(path: Path, file: FileEntry) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def _sweep(root: Path) -> None:
    """Delete what crashed processes left behind; a running one's download stays."""
    if not root.is_dir():
        return
    for leftover in root.glob(f"{_TEMPORARY}*"):
        owner = leftover.name.removeprefix(_TEMPORARY).partition("-")[0]
        if not (owner.isdecimal() and _is_another_running(int(owner))):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_another_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


async def _in_thread(doing: str, work: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise RegistryUnavailable(doing, reason_of(error)) from error
