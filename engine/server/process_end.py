"""When a process is to end: by a signal, or because the one that started it is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger(__name__)

END_WITH_PARENT = "LORAPLEX_END_WITH_PARENT"  # environment: the parent's process id
_LOOK_S = 0.5  # between looks at the parent


@contextmanager
def told_to_end() -> Iterator[asyncio.Event]:
    """An event that SIGTERM, SIGINT or the parent's end (see END_WITH_PARENT) sets during the block.

    Afterwards the signals go on doing so: one that comes while the process stops cuts nothing short.
    """
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    watching = asyncio.create_task(_set_with_parent(ending))
    try:
        yield ending
    finally:
        watching.cancel()


async def _set_with_parent(ending: asyncio.Event) -> None:
    """Set the event when the process that started this one is gone, if that asked for it."""
    parent = os.environ.get(END_WITH_PARENT, "")
    while parent:
        await asyncio.sleep(_LOOK_S)
        if str(os.getppid()) != parent:
            log.warning("the process that started this one is gone: draining")
            ending.set()
            return
