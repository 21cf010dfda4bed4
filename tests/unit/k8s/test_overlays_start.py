"""The settings of the overlays with routers, started: engine, router, a caller, the kubelet's probes and Prometheus."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from engine.client import AsyncClient
from engine.client.errors import RequestError
from engine.client.testing import FakeServer, fake_server, write_adapter
from engine.cluster.router.app import RouterApp
from engine.cluster.router.workers import source_of
from engine.config import RouterSettings
from tests.unit.identity.conftest import TENANTS, Authority, Keys, make_keys
from tests.unit.k8s.test_agrees_with_code import settings_of

_ELSEWHERE = {
    "engine",
    "model",
    "registry",
    "cache",
    "host",
    "port",
    "http_port",
    "replicas",
    "audit_log",
}  # but in a pod
_ROUTER = {"roles": ["observe"], "adapters": ["*"], "base": True}


class Secrets:
    """The Secrets that docs/kubernetes.md has one make, as the folders that they are in a pod."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority()
        self.keys: Keys = make_keys(TENANTS | {"routers": _ROUTER})
        self.keys.write(self._file("policy/policy.yaml"))
        self._file("key/key").write_text(self.keys.of["routers"])

    def of(self, settings: Any, name: str) -> dict[str, Any]:
        """A pod's settings with its own files in the place of the mounted ones; the certificates have this name."""
        for file, content in zip(("tls.crt", "tls.key"), self.authority.issue(name), strict=True):
            self._file(f"{name}/{file}").write_bytes(content)
        self._file(f"{name}/ca.crt").write_bytes(self.authority.pem)
        given = settings.model_dump(exclude=_ELSEWHERE)
        mounts = {"/etc/loraplex/tls/": f"{name}/", "/etc/loraplex/policy/": "policy/", "/etc/loraplex/key/": "key/"}
        for setting, value in given.items():
            for mount, folder in mounts.items():
                if str(value).startswith(mount):
                    given[setting] = self.folder / folder / Path(value).name
        return given | {"drain_s": 0.2}

    def _file(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        return path


@contextmanager
def engine_of(overlay: str, secrets: Secrets, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeServer, Any]]:
    """The overlay's engine, and its router's settings."""
    _, _, engine = next(one for one in settings_of(overlay, monkeypatch) if "engine" in one[0].name)
    _, _, router = next(one for one in settings_of(overlay, monkeypatch) if "router" in one[0].name)
    with fake_server(**secrets.of(engine, "loraplex-engine"), audit_log=secrets.folder / "audit.jsonl") as server:
        given = secrets.of(router, "loraplex") | {
            "replicas": f"dns:localhost:{server.app.port}",
            "port": 0,
            "http_port": 0,
        }
        yield server, RouterSettings(**given)


@pytest.mark.parametrize("overlay", ["fleet", "mtls"])
async def test_engine_and_router_find_each_other(overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with TLS and keys where the overlay wants them; callers and probes are answered, and the metrics read."""
    secrets = Secrets(tmp_path)
    write_adapter(tmp_path / "adapter")
    with engine_of(overlay, secrets, monkeypatch) as (server, settings):
        router = RouterApp(settings, source_of(settings))
        await router.start()
        try:
            secure = settings.tls_certificate is not None
            pair = secrets.authority.issue("somebody")
            tls = grpc.ssl_channel_credentials(secrets.authority.pem, pair[1], pair[0]) if secure else None
            known = {"credentials": tls, "api_key": secrets.keys.of["ops"]} if secure else {}
            async with AsyncClient(f"localhost:{router.port}", **known) as client:
                await client.adapters.publish(tmp_path / "adapter", "support")
                assert (await client.generate(adapter="support", prompt="hi")).adapter
            if secure:
                async with AsyncClient(f"localhost:{router.port}", credentials=tls, retries=0) as stranger:
                    with pytest.raises(RequestError, match=r"(?i)credentials|key"):
                        await stranger.generate(prompt="hi")
            for port in (server.app.http_port, router.http_port):
                assert await _status(port, "/readyz", secure=secure) == 200
                assert await _status(port, "/metrics", secure=secure, key=secrets.keys.of["watcher"]) == 200
        finally:
            await router.stop()


async def _status(port: int, path: str, *, secure: bool, key: str = "") -> int:
    """As the kubelet asks: it shows no certificate and checks none."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        async with session.get(f"{'https' if secure else 'http'}://localhost:{port}{path}", headers=headers) as answer:
            return answer.status
