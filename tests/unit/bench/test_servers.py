"""A server that cannot start is reported by name and leaves nothing behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from loadtest.bench.child import ContenderDied, start
from loadtest.bench.frontend.servers import _until


async def test_a_server_that_ends_before_it_is_ready_is_named(tmp_path: Path) -> None:
    """At once, with the end of its log, and not after the longest start."""
    command = [sys.executable, "-c", "raise SystemExit('the port is taken')"]
    running = await start("vllm serve", command, {}, tmp_path, piped=False)
    with pytest.raises(ContenderDied, match=r"(?s)vllm serve did not start.*the port is taken"):
        await _until(asyncio.sleep(60), running)


async def test_a_server_that_is_ready_says_how_long_it_took(tmp_path: Path) -> None:
    """And runs on until it is stopped."""
    running = await start(
        "vllm serve", [sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path, piped=False
    )
    try:
        assert (await _until(asyncio.sleep(0), running)).ready_s > 0
        assert running.process.returncode is None
    finally:
        await running.stop()
    assert running.process.returncode is not None
