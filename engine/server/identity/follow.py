"""Files that are read again when they change: the policy, and certificates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from engine.errors import LoraplexError

log = structlog.get_logger(__name__)

LOOK_S = 0.5  # between looks at the files

T = TypeVar("T")


class Followed(Generic[T]):
    """What `read` makes of the files. When it fails, the last good value stays in force, which is said loudly.

    `valid` is false as long as what is on the disk is not what is in force. The first reading raises what `read` raises.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._stamp = self._look()
        self.value = read()
        self.valid = True

    def refresh(self) -> bool:
        """Look at the files; true if there is a new value. Blocks, but not for long."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self.value = self._read()
        except Exception as error:  # noqa: BLE001 - anybody's typing: whatever it leads to, the next file has to be read
            self.valid = False
            problem = error.message if isinstance(error, LoraplexError) else type(error).__name__
            log.critical(
                "a changed file is broken: what was there before stays in force", file=self._what, problem=problem
            )
            return False
        self.valid = True
        log.warning("a changed file is in force from now on", file=self._what)
        return True

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs once a file was written or replaced; through links, as Kubernetes replaces files by changing one."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
