"""Where the registry's bytes lie: a folder or an object store, behind the six operations that the registry needs."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from engine.errors import BadConfiguration, RegistryUnavailable

T = TypeVar("T")

_CHUNK = 4 * 1024 * 1024
# The defaults retry for three minutes: a caller would rather hear soon that the store is away.
_RETRY = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_CLIENT = {"connect_timeout": "5s", "timeout": "5m"}
_REASONS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk full",
    errno.EROFS: "read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


class AlreadyThere(Exception):
    """Something exists under a path that was to be created."""


class Missing(Exception):
    """Nothing exists under a path."""


class Oversized(Exception):
    """An object is larger than its reader allows."""


class Store:
    """Bytes under slash-separated paths. Every failure of the storage itself is RegistryUnavailable."""

    def __init__(self, backend: ObjectStore) -> None:
        self._backend = backend
        self._root = _Root(Path(backend.prefix)) if isinstance(backend, LocalStore) and backend.prefix else None

    @classmethod
    def open(cls, where: str | Path) -> Store:
        """Open a folder (made if need be) or an s3://, gs://, az://, file:// or memory:// URL.

        Every memory:// store is a new, empty one.
        """
        scheme, separator, rest = str(where).partition("://")
        with _translated("opening the registry"):
            if not separator:
                return cls(_folder(Path(where)))
            if scheme == "file":
                return cls(_folder(Path(rest)))
            if scheme == "memory":
                return cls(MemoryStore())
            return cls(_remote(str(where)))

    async def get(self, path: str) -> bytes:
        """Read a whole object; raises Missing."""

        async def read() -> bytes:
            answer = await obstore.get_async(self._backend, path)
            return bytes(await answer.bytes_async())

        return await self._read(path, read)

    async def download(self, path: str, target: Path, limit: int) -> tuple[int, str]:
        """Write an object to the new file `target`; return its size and SHA-256.

        Raises Missing, and Oversized once it is longer than `limit` bytes.
        """

        async def read() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            answer = await obstore.get_async(self._backend, path)
            with await asyncio.to_thread(target.open, "xb") as file:
                async for chunk in answer.stream(min_chunk_size=_CHUNK):
                    size += len(chunk)
                    if size > limit:
                        raise Oversized
                    await asyncio.to_thread(_append, file, digest, bytes(chunk))
            return size, digest.hexdigest()

        return await self._read(path, read)

    async def create(self, path: str, data: bytes) -> None:
        """Write a new object, all or nothing; raises AlreadyThere when the path is taken."""
        async with self._steady(f"writing {path}"):
            await obstore.put_async(self._backend, path, data, mode="create", use_multipart=False)

    async def list(self, prefix: str) -> list[str]:
        """Return the paths of all objects in the folder `prefix` and below."""
        async with self._steady(f"listing {prefix}"):
            found = await obstore.list(self._backend, prefix).collect_async()
        return sorted(entry["path"] for entry in found)

    async def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; those that do not exist are fine."""
        for path in paths:
            with _translated(f"deleting {path}"):
                try:
                    await obstore.delete_async(self._backend, path)
                except FileNotFoundError:
                    continue

    async def _read(self, path: str, read: Callable[[], Awaitable[T]]) -> T:
        """Raises Missing only if the object is missing while the storage is there."""
        try:
            return await self._read_once(path, read)
        except Missing:  # the storage may have been away at that moment, and be back
            return await self._read_once(path, read)

    async def _read_once(self, path: str, read: Callable[[], Awaitable[T]]) -> T:
        try:
            with _translated(f"reading {path}"):
                return await read()
        except Missing:
            async with self._steady(f"reading {path}"):
                raise

    @asynccontextmanager
    async def _steady(self, doing: str) -> AsyncIterator[None]:
        """What is done in the block is done to one storage that is there all the time, or RegistryUnavailable is raised."""
        with _translated(doing):
            if self._root is None:
                yield
            else:
                before = await asyncio.to_thread(self._root.identity)
                yield
                if await asyncio.to_thread(self._root.identity) != before:
                    raise NotADirectoryError


class _Root:
    """The folder of a registry on disk. Unmounted or moved, it would look like one whose adapters were all deleted.

    The walk of a listing goes by paths and passes over what is not there (any more), and a write makes the folders it needs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inhabited = False

    def identity(self) -> tuple[int, int]:
        """Which folder it is; raises NotADirectoryError when it is away, or empty though it was not (a bare mount point)."""
        was_inhabited = self._inhabited  # before looking: another thread may see the first thing come meanwhile
        try:
            with os.scandir(self._path) as entries:
                inhabited = any(entries)
            found = self._path.stat()
        except FileNotFoundError as error:
            raise NotADirectoryError from error
        if was_inhabited and not inhabited:
            raise NotADirectoryError
        self._inhabited = self._inhabited or inhabited
        return found.st_dev, found.st_ino


def _folder(path: Path) -> LocalStore:
    return LocalStore(path.expanduser().resolve(), mkdir=True)


def _remote(url: str) -> ObjectStore:
    try:
        return from_url(url, retry_config=_RETRY, client_options=_CLIENT)  # type: ignore[call-overload, no-any-return]
    except (BaseError, ValueError) as error:
        raise BadConfiguration(f"registry: {url.partition('?')[0]} is no usable store") from error


def _append(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    digest.update(chunk)
    file.write(chunk)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Turn what obstore and the file system raise into the registry's own errors."""
    try:
        yield
    except AlreadyExistsError as error:
        raise AlreadyThere from error
    except FileNotFoundError as error:
        raise Missing from error
    except (BaseError, OSError) as error:
        raise RegistryUnavailable(doing, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Say in two words why the storage failed; the error's own text names local paths."""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.errno in _REASONS:
        return _REASONS[error.errno]
    text = str(error)
    for code, reason in _REASONS.items():
        # obstore keeps the number only in its message, as Rust prints it.
        if f"(os error {code})" in text or os.strerror(code) in text:
            return reason
    return "not reachable"
