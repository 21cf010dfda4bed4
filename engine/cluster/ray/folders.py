"""Folders of children: who has which is a lock that lasts as long as the child, which may outlive its Ray actor."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_KEPT = 8  # of children that have ended, for who looks for what went wrong


@contextmanager
def own_folder(root: Path) -> Iterator[tuple[Path, int]]:
    """The first folder in `root` that no other process has, and a lock on it: it lasts while anyone keeps that open.

    Ray numbers its replicas, too, but gives them new numbers after a change rolled, and knows nothing of who still drains.
    """
    for number in itertools.count():
        folder = root / f"engine-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            yield folder, lock
        finally:
            os.close(lock)
        return


@contextmanager
def fresh_folder(prefix: str) -> Iterator[tuple[Path, int]]:
    """A new folder for a child's settings and log, and a lock as own_folder's; of those who have ended only the latest stay."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = sorted((_last_change(one), one) for one in folder.parent.glob(f"{prefix}*") if _has_ended(one))
        for _, oldest in ended[:-_KEPT]:
            shutil.rmtree(oldest, ignore_errors=True)
        yield folder, lock
    finally:
        os.close(lock)


def _has_ended(folder: Path) -> bool:
    """Whether the folder was a child's of ours, and none has it any more."""
    try:
        if folder.lstat().st_uid != os.getuid():
            return False
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _last_change(folder: Path) -> float:
    with suppress(OSError):  # another one removes it, too
        return max(file.stat().st_mtime for file in folder.iterdir())
    return 0.0
