"""The scripted server on a real socket, and a run of a tape against it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from loadtest.selftest.server import Script, ScriptedServer


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedServer]:
    """A scripted server, which answers at once and rightly until it gets another script."""
    server = ScriptedServer(Script())
    await server.start()
    yield server
    await server.stop()
