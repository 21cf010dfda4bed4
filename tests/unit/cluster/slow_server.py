"""A whole server as a process, whose fake engine takes its time: `python -m tests.unit.cluster.slow_server SETTINGS`.

SETTINGS is JSON: those of engine.config.Settings, and `token_interval_s`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys

import structlog

from engine.config import Settings
from engine.runtime.fake import FakeEngine
from engine.server.app import App


async def main() -> None:
    """Serve until SIGTERM."""
    given = json.loads(sys.argv[1])
    engine = FakeEngine(token_interval_s=given.pop("token_interval_s"))
    app = App(Settings(engine="fake", **given), engine)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        await app.start()
        await stopping.wait()
    finally:
        await app.stop()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(main())
