"""A router in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.client import AsyncClient
from loadtest.bench.child import Running, start
from loadtest.ports import free_port

NAME = "loraplex router"


async def start_router(replicas: Sequence[str], scratch: Path, *flags: str, name: str = NAME) -> Running:
    """Start it before the replicas at these addresses, and wait until it is ready; its `port` says where."""
    port = free_port()
    command = [
        sys.executable, "-m", "engine.cli", "router", "--replicas", ",".join(replicas), "--port", str(port),
        "--http-port", "0", "--log-level", "warning", *flags,
    ]  # fmt: skip
    running = await start(name, command, {}, scratch, piped=False)
    running.port = port
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        await client.wait_ready(timeout_s=60)
    return running
