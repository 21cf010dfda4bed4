"""Small fleets of whole servers with made-up answers, a router before them, and ways to break them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.client import AsyncClient
from engine.client.testing import write_adapter, write_base
from engine.cluster.fleet import StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from engine.runtime.fake import FakeEngine
from engine.server.app import App
from tests.unit.server.conftest import Stubs, settings_in, stubs_to

_QUICK = {"drain_s": 0, "refresh_s": 30}


@dataclass
class Cluster:
    """Servers that share a registry, and the router that stubs and client are connected to."""

    folder: Path
    apps: list[App]
    router: RouterApp
    stubs: Stubs
    client: AsyncClient
    engines: list[FakeEngine] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        """Of the servers."""
        return [f"127.0.0.1:{app.port}" for app in self.apps]

    async def publish(self, name: str, seed: int = 0) -> str:
        """Publish a new version through the router."""
        folder = self.folder / f"{name}-{seed}"
        if not folder.exists():
            write_adapter(folder, seed)
        return (await self.client.adapters.publish(folder, name)).version

    def busy(self) -> int:
        """Which server has a request."""
        return next(number for number, engine in enumerate(self.engines) if engine.running)

    def look(self, number: int) -> Any:
        """Have the router ask a server how it is."""
        return self.router.fleet.look(self.router.fleet.links[self.addresses[number]])

    async def end(self, number: int) -> None:
        """Take a server off the network at once, which the router has noticed when this returns."""
        server = self.apps[number]._server
        assert server
        await server.stop(None)
        await self.look(number)

    def pause(self, number: int) -> None:
        """Have requests fail at a server until the router sends it none for a second."""
        for _ in range(3):
            self.router.fleet.failed(self.router.fleet.links[self.addresses[number]])

    def residents(self, number: int) -> set[str]:
        """What a server's engine holds."""
        generator = self.apps[number].generator
        return {one.manifest.ref for one in generator.residency.residents()} if generator else set()


@asynccontextmanager
async def start_cluster(folder: Path, count: int = 2, **settings: Any) -> AsyncIterator[Cluster]:
    """So many servers on the test's own event loop, `token_interval_s` seconds a token."""
    interval = settings.pop("token_interval_s", 0.0)
    router_settings = settings.pop("router", {})
    models = [_base(folder, name) for name in settings.pop("models", ("base",) * count)]
    async with AsyncExitStack() as stack:
        engines = [FakeEngine(token_interval_s=interval) for _ in range(count)]
        apps = [
            App(settings_in(folder, **(_QUICK | {"model": model, "cache": folder / f"cache-{n}"} | settings)), engine)
            for n, (model, engine) in enumerate(zip(models, engines, strict=True))
        ]
        for app in apps:
            stack.push_async_callback(app.stop)
            await app.start()
        addresses = [f"127.0.0.1:{app.port}" for app in apps]
        given = {
            "replicas": ",".join(addresses),
            "port": 0,
            "http_port": 0,
            "drain_s": 0,
            "poll_s": 0.05,
            "give_up_s": 3,
            "coalesce": False,  # so that streams can be compared message by message, however busy the tests are
        }
        router = RouterApp(RouterSettings(**(given | router_settings)), StaticSource(addresses))
        stack.push_async_callback(router.stop)
        await router.start()
        target = f"127.0.0.1:{router.port}"
        stubs = await stack.enter_async_context(stubs_to(target))
        client = await stack.enter_async_context(AsyncClient(target, timeout_s=20, retries=0))
        yield Cluster(folder, apps, router, stubs, client, engines)


def _base(folder: Path, name: str) -> Path:
    """A base model; each name makes one with a fingerprint of its own."""
    model = folder / name
    if not model.exists():
        write_base(model)
        (model / "tokenizer.json").write_text(f'{{"name": "{name}"}}')
    return model


StartCluster = Callable[..., AbstractAsyncContextManager[Cluster]]


@pytest.fixture
def start(tmp_path: Path) -> StartCluster:
    """Starts a cluster in this test's folder."""
    return lambda *args, **settings: start_cluster(tmp_path, *args, **settings)
