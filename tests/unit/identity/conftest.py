"""Policies, keys, tokens and certificates, and a server that asks who calls."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from grpc import aio

from engine.client.testing import FakeServer, fake_server
from engine.server.identity.keys import new_key
from tests.unit.server.conftest import Stubs

ISSUER, AUDIENCE = "https://login.test", "loraplex"


@cache
def signing_key(name: str, kind: str = "EC") -> Any:
    """A private key; the same for the same name."""
    return ec.generate_private_key(ec.SECP256R1()) if kind == "EC" else rsa.generate_private_key(65537, 2048)


def pem(key: Any) -> bytes:
    """A private key as it is in a file."""
    return bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def public_pem(key: Any) -> bytes:
    """Its public half."""
    return bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def jwks(**keys: Any) -> str:
    """A set of public keys, by key id."""
    algorithms = {
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
    }
    found = []
    for kid, key in keys.items():
        algorithm = next(one for kind, one in algorithms.items() if isinstance(key, kind))
        found.append(algorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid, "use": "sig"})
    return json.dumps({"keys": found})


def token(key: Any = None, algorithm: str = "ES256", kid: str | None = "k1", **claims: Any) -> str:
    """A token of ISSUER for the tenant acme, unless the claims say otherwise; None leaves a claim out."""
    now = int(time.time())
    given = {"iss": ISSUER, "aud": AUDIENCE, "sub": "acme", "exp": now + 600, "iat": now} | claims
    given = {name: value for name, value in given.items() if value is not None}
    headers = {"kid": kid} if kid else None
    return jwt.encode(given, signing_key("k1") if key is None else key, algorithm, headers=headers)


@dataclass
class Authority:
    """A certificate authority that signs whatever it is asked to."""

    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.certificate = self._signed("test CA", self.key, [], days=10, authority=True)

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, name: str, *uris: str, days: float = 5, begins: float = -10, key: Any = None
    ) -> tuple[bytes, bytes]:
        """A certificate for localhost with this common name, valid between these days from now, and its key."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        names: list[Any] = [x509.DNSName("localhost"), x509.DNSName(name), *map(x509.UniformResourceIdentifier, uris)]
        return self._signed(name, key, names, days, begins).public_bytes(serialization.Encoding.PEM), pem(key)

    def _signed(
        self, name: str, key: Any, others: list[Any], days: float, begins: float = -10, *, authority: bool = False
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if authority else self.certificate.subject
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=begins))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if others:
            builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@dataclass
class Keys:
    """API keys by tenant, and the policy that knows them."""

    policy: dict[str, Any]
    of: dict[str, str]

    def header(self, tenant: str) -> tuple[tuple[str, str], ...]:
        """Metadata with the tenant's key."""
        return (("authorization", f"Bearer {self.of[tenant]}"),)

    def write(self, path: Path, **changes: Any) -> Path:
        """The policy as a file; `changes` are of tenants, by name."""
        content = json.loads(json.dumps(self.policy))
        for tenant, change in changes.items():
            content["tenants"][tenant].update(change)
        path.write_text(yaml.safe_dump(content))
        return path


def make_keys(tenants: dict[str, dict[str, Any]], **rest: Any) -> Keys:
    """A policy of these tenants, one key each."""
    made = {name: new_key() for name in tenants}
    policy = {
        "version": 1,
        "tenants": {
            name: given | {"keys": [{"id": made[name][1].id, "sha256": made[name][1].sha256}]}
            for name, given in tenants.items()
        },
        **rest,
    }
    return Keys(policy, {name: key for name, (key, _) in made.items()})


TENANTS: dict[str, dict[str, Any]] = {
    "ops": {"roles": ["admin"], "adapters": ["*"], "base": True},
    "acme": {"roles": ["invoke"], "adapters": ["acme-*", "shared"]},
    "rival": {"roles": ["invoke", "publish", "promote"], "adapters": ["rival-*"], "base": True},
    "watcher": {"roles": ["observe"], "adapters": ["*"]},
}


@pytest.fixture(scope="session")
def keys() -> Keys:
    """The tenants of the shared server."""
    issuers = [{"issuer": ISSUER, "audience": AUDIENCE, "jwks": "jwks.json", "algorithms": ["ES256", "RS256"]}]
    return make_keys(TENANTS, issuers=issuers)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared server's files are."""
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="session")
def server(keys: Keys, folder: Path) -> Iterator[FakeServer]:
    """One server with a policy, for all tests that leave it as it is; it has the adapters acme-bot, rival-bot and shared."""
    (folder / "jwks.json").write_text(jwks(k1=signing_key("k1"), r1=signing_key("r1", "RSA")))
    settings = {"policy": keys.write(folder / "policy.yaml"), "audit_log": folder / "audit.jsonl"}
    with fake_server(refresh_s=0.1, **settings) as fake:
        fake.api_key = keys.of["ops"]
        for name in ("acme-bot", "rival-bot", "shared"):
            fake.publish(name)
            fake.promote(name, "v1")
        yield fake


@pytest.fixture
async def stubs(server: FakeServer) -> AsyncIterator[Stubs]:
    """Calls to the shared server; each says who makes it, by its metadata."""
    async with aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
        yield Stubs(channel)
