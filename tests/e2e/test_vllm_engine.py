"""The real engine passes the suite that the fake one passes."""

from __future__ import annotations

import pytest

from engine.runtime.engine import Engine, LoadedAdapter
from engine.server.app import App
from tests.e2e.conftest import ADAPTERS, heldout
from tests.engine_suite import EngineSuite

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
]


@pytest.fixture
def engine(app: App) -> Engine:
    """The server's own engine: one start serves all of these tests."""
    return app.engine


@pytest.fixture
def adapters() -> tuple[LoadedAdapter, LoadedAdapter]:
    """Two adapters of different ranks, under ids that the server's residency never reaches."""
    return (
        LoadedAdapter(500_001, "suite-support@v1#1", ADAPTERS["support@v1"], 8),
        LoadedAdapter(500_002, "suite-code@v1#1", ADAPTERS["code@v1"], 16),
    )


@pytest.fixture
def question() -> str:
    """A support ticket: one adapter knows the category, the other writes a command, the base chats."""
    return heldout("support@v1", 1)[0][0]


class TestVllmEngine(EngineSuite):
    """The shared suite."""
