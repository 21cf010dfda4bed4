"""Where the registry's bytes lie: a folder or an object store, behind the six operations that the registry needs."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from engine.errors import BadConfiguration, RegistryUnavailable

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
        async with self._reading(path):
            answer = await obstore.get_async(self._backend, path)
            return bytes(await answer.bytes_async())

    async def download(self, path: str, target: Path, limit: int) -> tuple[int, str]:
        """Write an object to the new file `target`; return its size and SHA-256.

        Raises Missing, and Oversized once it is longer than `limit` bytes.
        """
        digest, size = hashlib.sha256(), 0
        async with self._reading(path):
            answer = await obstore.get_async(self._backend, path)
            with await asyncio.to_thread(target.open, "xb") as file:
                async for chunk in answer.stream(min_chunk_size=_CHUNK):
                    size += len(chunk)
                    if size > limit:
                        raise Oversized
                    await asyncio.to_thread(_append, file, digest, bytes(chunk))
        return size, digest.hexdigest()

    async def create(self, path: str, data: bytes) -> None:
        """Write a new object, all or nothing; raises AlreadyThere when the path is taken."""
        with _translated(f"writing {path}"):
            await obstore.put_async(self._backend, path, data, mode="create", use_multipart=False)

    async def list(self, prefix: str) -> list[str]:
        """Return the paths of all objects in the folder `prefix` and below."""
        with _translated(f"listing {prefix}"):
            await self._require_root()
            found = await obstore.list(self._backend, prefix).collect_async()
        return sorted(entry["path"] for entry in found)

    async def list_folders(self, prefix: str) -> Iterable[str]:
        """Return the names of the folders directly in the folder `prefix`."""
        with _translated(f"listing {prefix}"):
            found = await obstore.list_with_delimiter_async(self._backend, prefix)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    @asynccontextmanager
    async def _reading(self, path: str) -> AsyncIterator[None]:
        """Raises Missing only if the registry itself is there."""
        try:
            with _translated(f"reading {path}"):
                yield
        except Missing:
            with _translated(f"reading {path}"):
                await self._require_root()
            raise

    async def _require_root(self) -> None:
        """A folder that was unmounted or removed would look like a registry whose adapters were all deleted."""
        if isinstance(self._backend, LocalStore):
            await asyncio.to_thread(_require_folder, self._backend)

    async def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; those that do not exist are fine."""
        for path in paths:
            with _translated(f"deleting {path}"):
                try:
                    await obstore.delete_async(self._backend, path)
                except FileNotFoundError:
                    continue


def _folder(path: Path) -> LocalStore:
    return LocalStore(path.expanduser().resolve(), mkdir=True)


def _require_folder(store: LocalStore) -> None:
    if store.prefix is not None and not Path(store.prefix).is_dir():
        raise NotADirectoryError


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
