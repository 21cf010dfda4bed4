"""One real server for the whole session: vLLM, the small base model, and the four adapters that this repository ships."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from engine.client import AsyncClient
from engine.config import Settings
from engine.server.app import App
from loadtest.drive.processes import below

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "smollm2-135m-instruct"
ADAPTERS = {
    "support@v1": ROOT / "examples" / "support" / "v1",
    "support@v2": ROOT / "examples" / "support" / "v2",
    "legal@v1": ROOT / "examples" / "legal" / "v1",
    "code@v1": ROOT / "examples" / "code" / "v1",
}


def heldout(ref: str, count: int) -> list[tuple[str, str]]:
    """The first rows that an adapter was not trained on: prompt and right answer."""
    lines = (ROOT / "examples" / ref.partition("@")[0] / "heldout.jsonl").read_text().splitlines()
    return [(row["prompt"], row["completion"].strip()) for row in map(json.loads, lines[:count])]


def computing() -> list[psutil.Process]:
    """The processes that compute, those of the latest engine last: workers if there are any, else vLLM's engines."""
    return below(os.getpid(), ["Worker"]) or below(os.getpid(), ["EngineCore"])


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    """The server, in float32 so that answers do not depend on rounding in a batch."""
    if not MODEL.is_dir():
        pytest.fail("the base model is missing: run `make model`")
    folder = tmp_path_factory.mktemp("server")
    settings = Settings(
        model=MODEL,
        registry=str(folder / "registry"),
        cache=folder / "cache",
        port=0,
        http_port=0,
        dtype="float32",
        context_length=1024,
        max_running=24,
        kv_cache_gib=1,
        drain_s=2,
        refresh_s=0.5,
    )
    server = App(settings)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(app: App) -> AsyncIterator[AsyncClient]:
    """Our client, connected to it."""
    async with AsyncClient(f"127.0.0.1:{app.port}", timeout_s=120, retries=0) as connected:
        yield connected


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def published(client: AsyncClient) -> list[str]:
    """The shipped adapters, published through gRPC; their references."""
    versions = [await client.adapters.publish(folder, ref.partition("@")[0]) for ref, folder in ADAPTERS.items()]
    return [f"{version.name}@{version.version}" for version in versions]
