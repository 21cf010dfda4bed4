"""The audit log: one JSON line for every act that changes something, and for every one that was refused.

Appended and synced before the call ends. The file is for its owner only, and is opened anew when it was
moved away, as logrotate does. Its lines hold names, never credentials.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from engine.errors import BadConfiguration

log = structlog.get_logger(__name__)

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of a pipe, such as /dev/stdout


class AuditLog:
    """The file. `failed` is called when a line could not be written. Raises BadConfiguration if it cannot be opened."""

    def __init__(self, path: Path, failed: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._failed = failed
        self._lock = threading.Lock()
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise BadConfiguration(f"the audit log {path.name} cannot be written: {error.strerror}") from error

    def write(self, **facts: Any) -> None:
        """Append a line; blocks until it is on the disk. What cannot be written goes to the log of errors at least."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | facts, default=str) + "\n"
        try:
            with self._lock:
                file = self._follow()
                try:
                    _append(file, line.encode())
                finally:
                    if self._closed:
                        os.close(file)
        except OSError as error:
            self._failed()
            log.critical("the audit log cannot be written", why=error.strerror, line=line.rstrip())

    def close(self) -> None:
        """Close the file. A line that comes later is still written: its number may be another file's by then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._file)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _follow(self) -> int:
        """The file to write to: opened anew if another one, or none, is at its place."""
        if self._closed:
            return self._open()
        try:
            there, ours = os.stat(self._path), os.fstat(self._file)  # noqa: PTH116
            moved = (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)
        except FileNotFoundError:
            moved = True
        if moved:
            new = self._open()
            os.close(self._file)
            self._file = new
        return self._file


def _append(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
