"""Files that change under a running server: policies and certificates, good ones and broken ones; and the ports' TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from cryptography import x509
from grpc import aio

from engine.api.loraplex.v1 import engine_pb2 as epb
from engine.api.loraplex.v1 import engine_pb2_grpc
from engine.client import AsyncClient, Unauthenticated
from engine.client.credentials import authorization
from engine.errors import BadConfiguration
from engine.server.app import App
from engine.server.identity.follow import Followed
from engine.server.identity.tls import Tls
from tests.unit.identity.conftest import TENANTS, Authority, make_keys
from tests.unit.server.conftest import ask, refused, running, settings_in, stubs_to

Code = grpc.StatusCode
MakeApp = Callable[..., App]


@pytest.fixture
def make(tmp_path: Path) -> MakeApp:
    """Makes a server with a policy that has not started."""
    return lambda **settings: App(settings_in(tmp_path, audit_log=tmp_path / "audit.jsonl", **settings))


def metric(app: App, name: str) -> float:
    """A gauge's value."""
    return next(
        float(line.split()[1]) for line in app.metrics.text().decode().splitlines() if line.startswith(f"{name} ")
    )


async def test_policy_changes(make: MakeApp, tmp_path: Path) -> None:
    """A changed policy holds for the next call; a broken one changes nothing, which a metric says."""
    keys = make_keys(TENANTS)
    file = keys.write(tmp_path / "policy.yaml")
    async with running(make(policy=file)) as app, stubs_to(f"127.0.0.1:{app.port}") as stubs:

        async def allowed() -> bool:
            await app.identity.refresh()
            try:
                await stubs.generation.Generate(ask(), metadata=keys.header("rival"))
            except aio.AioRpcError as error:
                return error.code() not in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED)
            return True

        assert await allowed()
        keys.write(file, rival={"base": False})
        assert not await allowed()
        for broken in (
            "tenants: [",
            "",
            "version: 1\ntenants: {}\nwat: 1",
            "version: !!bool maybe",
            "version: !!int ''",
        ):
            file.write_text(broken)
            assert not await allowed()
            assert metric(app, "loraplex_policy_valid") == 0
        file.unlink()
        assert not await allowed()
        keys.write(file)
        assert await allowed()
        assert metric(app, "loraplex_policy_valid") == 1
        revoked = [keys.policy["tenants"]["rival"]["keys"][0] | {"revoked": True}]
        keys.write(file, rival={"keys": revoked})
        assert not await allowed()


async def test_broken_files_at_the_start(make: MakeApp, tmp_path: Path) -> None:
    """A server does not start without its locks."""
    (tmp_path / "policy.yaml").write_text("version: 1")
    with pytest.raises(BadConfiguration, match="tenants"):
        make(policy=tmp_path / "policy.yaml")
    with pytest.raises(BadConfiguration, match=r"nowhere\.crt"):
        make(tls_certificate=tmp_path / "nowhere.crt", tls_key=tmp_path / "nowhere.key")
    (tmp_path / "file").touch()
    policy = make_keys(TENANTS).write(tmp_path / "good.yaml")
    with pytest.raises(BadConfiguration, match="audit log"):
        App(settings_in(tmp_path, policy=policy, audit_log=tmp_path / "file" / "audit.jsonl"))


class Files:
    """A server's TLS files."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority()
        self.certificate, self.key, self.ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"
        self.ca.write_bytes(self.authority.pem)
        self.serve("one")

    def serve(self, name: str, **how: Any) -> None:
        """Have the server show a certificate of this name from now on."""
        self.put(*self.authority.issue(name, **how))

    def put(self, certificate: bytes, key: bytes) -> None:
        """Write the files."""
        self.certificate.write_bytes(certificate)
        self.key.write_bytes(key)

    @property
    def settings(self) -> dict[str, Path]:
        """For the server."""
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    def shown(self, port: int, client: tuple[bytes, bytes] | None = None) -> str:
        """The common name of the certificate that a port shows; blocks."""
        import socket

        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        if client:
            both = self.certificate.with_suffix(".client")
            both.write_bytes(client[1] + client[0])
            context.load_cert_chain(both)
        with socket.create_connection(("localhost", port), timeout=5) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                der = secure.getpeercert(binary_form=True)
        assert der
        return x509.load_der_x509_certificate(der).subject.rfc4514_string().removeprefix("CN=")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """TLS files in the test's folder."""
    return Files(tmp_path)


async def test_tls_and_rotation(make: MakeApp, files: Files, tmp_path: Path) -> None:
    """Both ports speak TLS and show new certificates without a restart; a broken one leaves the old, which a metric says."""
    keys = make_keys(TENANTS)
    async with running(make(policy=keys.write(tmp_path / "policy.yaml"), **files.settings)) as app:
        ports = (app.port, app.http_port)

        async def shown() -> set[str]:
            await app.identity.refresh()
            return {await asyncio.to_thread(files.shown, port) for port in ports}

        assert await shown() == {"one"}
        tls = grpc.ssl_channel_credentials(files.authority.pem)
        async with AsyncClient(f"localhost:{app.port}", credentials=tls, api_key=keys.of["rival"], retries=0) as client:
            assert (await client.generate(prompt="hi", temperature=0)).text == "base heard: hi"
            files.serve("two")
            assert await shown() == {"two"}
            for broken in _broken(files):
                files.put(*broken)
                assert await shown() == {"two"}
                assert metric(app, "loraplex_tls_valid") == 0
            files.certificate.unlink()
            assert await shown() == {"two"}
            files.serve("three")
            assert await shown() == {"three"}
            assert metric(app, "loraplex_tls_valid") == 1
            assert (await client.generate(prompt="hi", temperature=0)).text == "base heard: hi"
        async with aio.insecure_channel(f"localhost:{app.port}") as plain:
            stub = engine_pb2_grpc.EngineServiceStub(plain)
            refusal = await refused(stub.GetEngine(epb.GetEngineRequest(), metadata=keys.header("ops"), timeout=1))
            assert refusal.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)


def _broken(files: Files) -> list[tuple[bytes, bytes]]:
    good = files.authority.issue("broken")
    return [
        (b"", b""),
        (good[0], files.authority.issue("other")[1]),
        (good[0][: len(good[0]) // 2], good[1]),
        (good[0], good[1][:-40]),
        (good[1], good[0]),
        files.authority.issue("expired", days=-1),
        files.authority.issue("not yet", begins=1),
        (_of_no_version(good[0]), good[1]),
    ]


def _of_no_version(certificate: bytes) -> bytes:
    """Certificates have version 1, 2 or 3."""
    der = ssl.PEM_cert_to_DER_cert(certificate.decode()).replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09", 1)
    return ssl.DER_cert_to_PEM_cert(der).encode()


def test_no_error_ends_the_watch(tmp_path: Path) -> None:
    """Whatever reading a changed file raises, the next change is read too."""
    file, answers = tmp_path / "file", iter([1, KeyError("maybe"), 3])

    def read() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    file.write_text("a")
    followed = Followed("file", [file], read)
    file.write_text("bb")
    assert not followed.refresh()
    assert (followed.value, followed.valid) == (1, False)
    file.write_text("ccc")
    assert followed.refresh()
    assert (followed.value, followed.valid) == (3, True)


async def test_mutual_tls(make: MakeApp, files: Files, tmp_path: Path) -> None:
    """A client certificate says who calls; gRPC takes nobody without a good one, and HTTP tells them its health alone."""
    tenants = TENANTS | {"acme": {"roles": ["observe"], "certificates": ["spiffe://test/acme"]}}
    keys = make_keys(tenants)
    settings = files.settings | {"tls_client_ca": files.ca}
    acme, stranger = files.authority.issue("acme", "spiffe://test/acme"), files.authority.issue("stranger")
    async with running(make(policy=keys.write(tmp_path / "policy.yaml"), **settings)) as app:

        async def engine(pair: tuple[bytes, bytes] | None, metadata: Any = ()) -> Any:
            parts = (pair[1], pair[0]) if pair else ()
            tls = grpc.ssl_channel_credentials(files.authority.pem, *parts)
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
            async with aio.secure_channel(f"localhost:{app.port}", tls, options) as channel:
                stub = engine_pb2_grpc.EngineServiceStub(channel)
                try:
                    return await stub.GetEngine(epb.GetEngineRequest(), metadata=metadata, timeout=5)
                except aio.AioRpcError as error:
                    return error.code()

        assert (await engine(acme)).engine == "fake"
        assert await engine(stranger) is Code.UNAUTHENTICATED
        assert (await engine(stranger, keys.header("watcher"))).engine == "fake"  # a key counts for more
        assert await engine(acme, (("authorization", "Bearer wrong"),)) is Code.UNAUTHENTICATED
        assert await engine(acme, (("x-loraplex-forwarded", "ipv4:10.0.0.9:1"),)) is Code.UNAUTHENTICATED  # a router's
        for pair in (None, Authority().issue("acme", "spiffe://test/acme"), files.authority.issue("acme", days=-1)):
            assert await engine(pair) in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
        assert [await _get(files, app, path, None) for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 401]
        assert await _get(files, app, "/metrics", acme) == 200
        assert await _get(files, app, "/metrics", stranger) == 401
        new = Authority()  # clients' certificates come from another authority from now on
        files.ca.write_bytes(new.pem)
        await app.identity.refresh()
        assert await engine(acme) in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
        assert (await engine(new.issue("acme", "spiffe://test/acme"))).engine == "fake"
        assert await _get(files, app, "/metrics", new.issue("acme", "spiffe://test/acme")) == 200
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await _get(files, app, "/metrics", acme)


async def _get(files: Files, app: App, path: str, pair: tuple[bytes, bytes] | None, key: str = "") -> int:
    context = ssl.create_default_context(cadata=files.authority.pem.decode())
    if pair:
        both = files.certificate.with_suffix(".client")
        both.write_bytes(pair[1] + pair[0])
        context.load_cert_chain(both)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        async with session.get(f"https://localhost:{app.http_port}{path}", headers=headers) as response:
            return response.status


async def test_metrics_need_a_role(server: Any, keys: Any) -> None:
    """/metrics is for who may observe, health for everybody."""
    url = f"http://127.0.0.1:{server.app.http_port}"
    async with aiohttp.ClientSession() as session:

        async def get(path: str, *values: str) -> int:
            headers = [("Authorization", value) for value in values]
            async with session.get(url + path, headers=headers) as response:
                if response.status == 401:
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                return response.status

        watcher, acme = (f"Bearer {keys.of[name]}" for name in ("watcher", "acme"))
        found = [await get("/metrics"), await get("/metrics", acme), await get("/metrics", watcher)]
        assert found == [401, 403, 200]
        assert await get("/metrics", watcher, watcher) == 401
        assert [await get("/healthz"), await get("/readyz")] == [200, 200]


async def test_client_keeps_its_key_to_itself(files: Files) -> None:
    """Our client sends no key to another machine without TLS, and says what to do."""
    with pytest.raises(Unauthenticated, match="TLS") as caught:
        AsyncClient("10.0.0.1:50051", api_key="lpx_aaaaaaaa_secret")
    assert "secret" not in str(caught.value)
    for elsewhere in ("127.attacker.example:1", "127.0.0.1.example:1", "[2001:db8::1]:1"):
        with pytest.raises(Unauthenticated):
            authorization("k", elsewhere, encrypted=False)
    for local in ("127.0.0.1:1", "127.1.2.3:1", "localhost:1", "[::1]:1", "unix:/tmp/s"):
        await AsyncClient(local, api_key="k").close()


def test_tls_files_that_do_not_fit(files: Files) -> None:
    """What cannot be used is refused with what is wrong about it, and nothing of the key."""
    good = files.authority.issue("x")
    cases = [((b"", good[1]), "no certificate"), ((good[0], b"x"), "no private key"), (_broken(files)[1], "not the certif"),
             (files.authority.issue("x", days=-1), "expired")]  # fmt: skip
    for pair, told in cases:
        files.put(*pair)
        with pytest.raises(BadConfiguration, match=told):
            Tls(files.certificate, files.key, None)
    files.put(*good)
    files.ca.write_text("nothing")
    with pytest.raises(BadConfiguration, match="client CA"):
        Tls(files.certificate, files.key, files.ca)
