"""Putting one version into the store so that others see all of it or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from engine.errors import CorruptVersion, InvalidAdapter, InvalidRequest, LoraplexError, RegistryUnavailable
from engine.registry.layout import CLAIM, MANIFEST, adapter_folder, tombstone_file, version_file
from engine.registry.manifest import FileEntry, Manifest, decode_manifest
from engine.registry.store import AlreadyThere, Missing, Store

Progress = Callable[[str, float], None]

_log = logging.getLogger(__name__)


def check_readable(manifest: Manifest, field: str) -> None:
    """Raise InvalidRequest about `field` unless the manifest can be written, and what is written can be read again."""
    try:
        decode_manifest(manifest.encode(), manifest.name, manifest.version)
    except (ValueError, CorruptVersion) as error:
        problem = "what is said about the version is nested too deeply, or is not valid Unicode"
        raise InvalidRequest(field, problem) from error


async def claim(store: Store, name: str, version: str) -> bool:
    """Try to take a version number for good; False when somebody else has it.

    The claim is what keeps two publishers' files apart: only its owner writes into the version's folder. It is never
    deleted, so the number of a publication that failed is passed over rather than used twice.
    """
    token = secrets.token_hex(16).encode()
    path = version_file(name, version, CLAIM)
    try:
        await store.create(path, token)
    except AlreadyThere:
        # A store that retries a write whose answer was lost reports our own claim as somebody else's.
        return await store.get(path) == token
    return True


async def upload(store: Store, manifest: Manifest, folder: Path, progress: Progress | None) -> None:
    """Write the files of a claimed version, then its manifest; on failure or cancellation leave nothing visible."""
    try:
        await _write_files(store, manifest, folder, progress)
    except BaseException:
        await _finish(_discard(store, manifest.name, manifest.version, [file.path for file in manifest.files]))
        raise
    try:
        await _commit(store, manifest)
    except BaseException:
        # The manifest may have been written although the answer was lost: only a tombstone makes deleting files safe.
        await _finish(withdraw(store, manifest.name, manifest.version))
        raise


async def withdraw(store: Store, name: str, version: str) -> None:
    """Mark a version as deleted for good, then delete its files; the claim stays."""
    await bury(store, name, version)
    await delete_files(store, name, version)


async def bury(store: Store, name: str, version: str) -> None:
    """Mark a version as deleted; twice is fine."""
    try:
        await store.create(tombstone_file(name, version), b"{}\n")
    except AlreadyThere:
        return


async def files_left(store: Store, name: str, version: str) -> list[str]:
    """List everything in a version's folder but the claim, the manifest first."""
    paths = await store.list(f"{adapter_folder(name)}/{version}")
    keep, first = version_file(name, version, CLAIM), version_file(name, version, MANIFEST)
    return sorted((path for path in paths if path != keep), key=lambda path: path != first)


async def delete_files(store: Store, name: str, version: str) -> None:
    """Delete everything in a version's folder but the claim, the manifest first."""
    await store.delete(await files_left(store, name, version))


async def _write_files(store: Store, manifest: Manifest, folder: Path, progress: Progress | None) -> None:
    written = 0
    for file in manifest.files:
        data = await asyncio.to_thread(_read_unchanged, folder, file)
        try:
            await store.create(version_file(manifest.name, manifest.version, file.path), data)
        except AlreadyThere as error:
            # Nobody else writes here; a retried write met itself, or something tampers with the store.
            if await store.get(version_file(manifest.name, manifest.version, file.path)) != data:
                raise RegistryUnavailable(f"writing {manifest.ref}", "another program writes to it") from error
        written += file.size_bytes
        if progress:
            progress("storing", written / max(1, manifest.size_bytes))


async def _commit(store: Store, manifest: Manifest) -> None:
    """Write the manifest: from here on the version exists."""
    path, data = version_file(manifest.name, manifest.version, MANIFEST), manifest.encode()
    try:
        await store.create(path, data)
    except (AlreadyThere, RegistryUnavailable):
        if not await _holds(store, path, data):
            raise


async def _holds(store: Store, path: str, data: bytes) -> bool:
    try:
        return await store.get(path) == data
    except (Missing, RegistryUnavailable):
        return False


async def _discard(store: Store, name: str, version: str, files: Sequence[str]) -> None:
    await store.delete(version_file(name, version, file) for file in files)


async def _finish(cleanup: Coroutine[object, object, None]) -> None:
    """Run `cleanup` to its end even when the caller is cancelled; what fails leaves only bytes that nobody sees."""
    task = asyncio.ensure_future(_logged(cleanup))
    await asyncio.shield(task)


async def _logged(cleanup: Coroutine[object, object, None]) -> None:
    try:
        await cleanup
    except (LoraplexError, Missing) as error:
        _log.warning("a failed publication left files behind: %s", error)


def _read_unchanged(folder: Path, file: FileEntry) -> bytes:
    try:
        data = (folder / file.path).read_bytes()
    except OSError:
        data = b""
    if len(data) != file.size_bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        problem = "the file changed while it was being published"
        raise InvalidAdapter("files", file.path, problem, fix="Publish again, and leave the folder alone meanwhile.")
    return data
