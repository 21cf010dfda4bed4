"""An issuer's keys from its https URL, as an identity provider publishes them."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.errors import Unauthenticated
from engine.server.identity.policy import Policy
from engine.server.identity.tokens import Tokens
from tests.unit.identity.conftest import AUDIENCE, ISSUER, Authority, jwks, signing_key, token


class Provider(ThreadingHTTPServer):
    """Publishes `body`; `asked` counts how often. It says nothing for as long as `silent` is clear."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.url = f"https://localhost:{self.server_port}/.well-known/jwks.json"
        self.body = jwks(k1=signing_key("k1"))
        self.status, self.asked = 200, 0
        self.speaks = threading.Event()
        self.speaks.set()

    def handle_error(self, *_: Any) -> None:
        """A client that breaks the handshake off is part of a test."""


class _Answer(BaseHTTPRequestHandler):
    server: Provider

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.speaks.wait(30)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body.encode())

    def log_message(self, *_: Any) -> None:
        """Not on the terminal."""


@contextmanager
def published(folder: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool = True) -> Iterator[Provider]:
    """A provider with a certificate of an authority that this process trusts, or not."""
    authority = Authority()
    for name, content in zip(("tls.crt", "tls.key"), authority.issue("provider"), strict=True):
        (folder / name).write_bytes(content)
    (folder / "ca.crt").write_bytes((authority if trusted else Authority()).pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.crt"))
    monkeypatch.setenv("no_proxy", "localhost")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    with Provider(tls) as provider:
        thread = threading.Thread(target=provider.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield provider
        finally:
            provider.speaks.set()
            provider.shutdown()
            thread.join()


def tokens_of(provider: Provider, folder: Path) -> Tokens:
    """Whoever verifies the provider's tokens."""
    issuer = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": provider.url, "algorithms": ["ES256"]}
    return Tokens(Policy.model_validate({"version": 1, "tenants": {"acme": {}}, "issuers": [issuer]}), folder)


async def test_keys_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched once for many callers, again for a new key, and the last ones stay while the provider is broken."""
    with published(tmp_path, monkeypatch) as provider:
        tokens = tokens_of(provider, tmp_path)
        found = await asyncio.gather(*(tokens.authenticate(token(jti=str(number))) for number in range(20)))
        assert {one.tenant for one in found} == {"acme"}
        assert provider.asked == 1
        monkeypatch.setattr("engine.server.identity.tokens._PATIENCE_S", 0.0)
        provider.body = jwks(k1=signing_key("k1"), k2=signing_key("k2"))
        assert (await tokens.authenticate(token(signing_key("k2"), kid="k2"))).tenant == "acme"
        for status, body in ((500, ""), (200, "<html>"), (200, "[]"), (200, '{"keys": 1}')):
            provider.status, provider.body = status, body
            with pytest.raises(Unauthenticated):
                await tokens.authenticate(token(kid="unknown"))
            assert (await tokens.authenticate(token(jti=f"after {status} {body}"))).tenant == "acme"


async def test_a_silent_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the connection and says nothing holds a caller up for a while, not for ever."""
    monkeypatch.setattr("engine.server.identity.tokens._TIMEOUT_S", 0.3)
    with published(tmp_path, monkeypatch) as provider:
        provider.speaks.clear()
        async with asyncio.timeout(10):
            with pytest.raises(Unauthenticated):
                await tokens_of(provider, tmp_path).authenticate(token())


async def test_a_provider_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys from whoever answers in its place, without its certificate, are none."""
    with published(tmp_path, monkeypatch, trusted=False) as provider:
        with pytest.raises(Unauthenticated):
            await tokens_of(provider, tmp_path).authenticate(token())
        assert not provider.asked
