"""Receiving an adapter's files: bounded, into a private folder, with no name that leads out of it."""

from __future__ import annotations

import asyncio
import errno
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.errors import InvalidAdapter, InvalidRequest, RegistryUnavailable

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_MAX_FILES = 64


@contextmanager
def private_folder() -> Iterator[Path]:
    """An empty folder for one upload, deleted at the end. Raises RegistryUnavailable when there is no room for it."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="loraplex-upload-")
    except OSError as error:
        raise RegistryUnavailable("receiving an upload", _why(error)) from error
    with folder as name:
        yield Path(name)


class Upload:
    """Writes the chunks of one upload into `folder`, which must exist and be empty."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self.bytes = 0
        self.files: set[str] = set()

    async def receive(self, requests: AsyncIterator[pb.PublishAdapterRequest]) -> AsyncGenerator[int, None]:
        """Write everything; yields the number of bytes so far after each chunk.

        Raises InvalidRequest (a second header, a file's chunks not in a row), InvalidAdapter (a bad name, too many files or
        bytes) or RegistryUnavailable (this server's disk is full).
        """
        current: str | None = None
        file: FileIO | None = None
        try:
            async for request in requests:
                if not request.HasField("chunk"):
                    raise InvalidRequest("header", "comes once, at the beginning of the upload")
                chunk = request.chunk
                if file is None or chunk.path != current:
                    if file:
                        file.close()
                    file, current = self._open(chunk.path), chunk.path
                self._count(len(chunk.data))
                await asyncio.to_thread(_write, file, chunk.data)
                yield self.bytes
        finally:
            if file:
                file.close()

    def _open(self, name: str) -> FileIO:
        if not _FILE_NAME.fullmatch(name):
            raise InvalidAdapter("path", name[:100], "is not a plain file name", fix="Upload the files of one folder.")
        if name in self.files:
            raise InvalidRequest("chunk.path", f"{name} was already sent: send a file's chunks one after the other")
        if len(self.files) == _MAX_FILES:
            raise InvalidAdapter("files", "", f"more than {_MAX_FILES} files", fix="Upload the adapter's files only.")
        self.files.add(name)
        try:
            return (self._folder / name).open("xb", buffering=0)  # a full disk shows here, not when the file is closed
        except OSError as error:
            raise RegistryUnavailable("receiving an upload", _why(error)) from error

    def _count(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self._max_bytes:
            raise InvalidAdapter(
                "size",
                "",
                f"the files are larger than {self._max_bytes} bytes together",
                fix="Save the adapter in bfloat16, or raise --max-adapter-mib.",
            )


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise RegistryUnavailable("receiving an upload", _why(error)) from error


def _why(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else "the file cannot be written"
