"""Two real engines behind a router: whatever happens to one of them, greedy float32 answers are the undisturbed ones."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engine.client import AsyncClient
from engine.cluster.fleet import StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from engine.server.app import App
from tests.e2e.conftest import computing, heldout

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
]

_SCHEMA = '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}'
ASKED: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "ignore_eos": True},
    {"prompt": "Once upon a time", "ignore_eos": True, "logprobs": 2},
    {"prompt": "The three largest cities are", "stop": [" the "], "ignore_eos": True},
    {"prompt": "Count: one, two,", "presence_penalty": 0.8, "frequency_penalty": 0.4, "ignore_eos": True},
    {"prompt": "Once upon a time", "temperature": 1.0, "seed": 5, "ignore_eos": True},
    {"prompt": "The capital of France as JSON:", "json_schema": _SCHEMA},
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def second(app: App, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    """Another server with the same registry."""
    changes = {"cache": tmp_path_factory.mktemp("second"), "max_running": 8}
    server = App(app.settings.model_copy(update=changes))
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def router(app: App, second: App) -> AsyncIterator[RouterApp]:
    """A router before both."""
    addresses = [f"127.0.0.1:{one.port}" for one in (app, second)]
    settings = RouterSettings(replicas=",".join(addresses), port=0, http_port=0, drain_s=1, give_up_s=90)
    started = RouterApp(settings, StaticSource(addresses))
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def routed(router: RouterApp, published: list[str]) -> AsyncIterator[AsyncClient]:
    """Our client, connected to it."""
    async with AsyncClient(f"127.0.0.1:{router.port}", timeout_s=180, retries=0) as connected:
        yield connected


def work() -> list[dict[str, Any]]:
    """Requests to the base and to three adapters."""
    adapters = [
        {"adapter": name, "prompt": heldout(f"{name}@v1", 1)[0][0], "ignore_eos": True}
        for name in ("support", "legal", "code")
    ]
    return [{"temperature": 0, "max_tokens": 32} | asked for asked in (*ASKED, *adapters)]


async def answer(client: AsyncClient, asked: dict[str, Any]) -> tuple[list[int], str, str, int]:
    """Tokens, text, end and failovers of one stream."""
    tokens: list[int] = []
    text, end, failovers = "", "", 0
    async for chunk in client.stream(**asked):
        tokens += chunk.token_ids
        text += chunk.text
        end, failovers = chunk.finish_reason or end, max(failovers, chunk.failovers)
    return tokens, text, end, failovers


async def test_cut_off_again_and_again(routed: AsyncClient, router: RouterApp) -> None:
    """All at once, with connections broken five times meanwhile: every answer as it is alone."""
    alone = [await answer(routed, asked) for asked in work()]
    asking = [asyncio.create_task(answer(routed, asked)) for asked in work()]
    for number in range(5):
        await asyncio.sleep(0.5)
        links = list(router.fleet.links.values())
        links[number % 2].give_up()
    disturbed = await asyncio.gather(*asking)
    assert [one[:3] for one in disturbed] == [one[:3] for one in alone]
    assert sum(one[3] for one in disturbed) > 0


async def test_a_killed_engine(routed: AsyncClient, app: App, second: App) -> None:
    """One engine is killed under load: streams go on at the other one, and nothing is lost or changed."""
    alone = [await answer(routed, asked) for asked in work()]
    asking = [asyncio.create_task(answer(routed, asked)) for asked in work() * 2]
    await asyncio.sleep(1.5)
    computing()[-1].send_signal(signal.SIGKILL)
    disturbed = await asyncio.gather(*asking)
    assert [one[:3] for one in disturbed] == [one[:3] for one in alone] * 2
    async with asyncio.timeout(120):
        while not (app.engine.ready and second.engine.ready):
            await asyncio.sleep(0.5)


async def test_a_promotion_on_both(routed: AsyncClient, router: RouterApp, app: App, second: App) -> None:
    """A promotion through the router is warm on both engines that hold the adapter, and so is the rollback."""
    async with asyncio.timeout(60):
        while len(router.fleet.usable()) < 2:  # a replica that has died before is not asked again at once
            await asyncio.sleep(0.2)
    await routed.adapters.preload("support@v1")
    try:
        promoted = await routed.adapters.promote("support", "v2")
        assert all(f"support@{promoted.version}" in held(server) for server in (app, second))
    finally:
        back = await routed.adapters.rollback("support")
    assert back.version == "v1"
    assert all("support@v1" in held(server) for server in (app, second))


def held(server: App) -> set[str]:
    """What is in a server's engine."""
    assert server.generator
    return {one.manifest.ref for one in server.generator.residency.residents()}
