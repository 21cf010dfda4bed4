"""Credentials: who is let in by which, and that nothing else is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Unauthenticated
from engine.server.identity.certificates import authenticate_certificate
from engine.server.identity.keys import authenticate_key, new_key
from engine.server.identity.policy import Policy
from engine.server.identity.tokens import Tokens
from tests.unit.identity.conftest import (
    AUDIENCE,
    ISSUER,
    Authority,
    jwks,
    public_pem,
    signing_key,
    token,
)


def policy_of(**acme: Any) -> Policy:
    """A policy with the tenant acme, and an issuer of tokens whose keys are in jwks.json."""
    issuer = {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "jwks": "jwks.json",
        "algorithms": ["ES256", "RS256"],
        "leeway_s": 5,
    }
    return Policy.model_validate({"version": 1, "tenants": {"acme": acme, "other": {}}, "issuers": [issuer]})


def with_key(**changes: Any) -> tuple[str, Policy]:
    """A key, and a policy that knows it."""
    key, kept = new_key()
    return key, policy_of(keys=[kept.model_dump() | changes])


# API keys


def test_key() -> None:
    """The whole key says whose it is, and by what; its text is nowhere in what is kept of it."""
    key, policy = with_key()
    found = authenticate_key(policy, key)
    assert (found.tenant, found.credential) == ("acme", f"key:{key.split('_')[1]}")
    assert key.split("_", 2)[2] not in repr(policy) + str(found) + policy.model_dump_json()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"revoked": True}, "revoked"),
        ({"expires": datetime.now(UTC) - timedelta(seconds=1)}, "expired"),
        ({"expires": datetime(2020, 1, 1)}, "expired"),  # noqa: DTZ001 - without a zone it is UTC
        ({"sha256": "0" * 64}, "not valid"),
    ],
)
def test_key_that_is_not_valid_any_more(changes: dict[str, Any], told: str) -> None:
    """A revoked or expired key is refused, and its owner is told; whoever has only its id is not."""
    key, policy = with_key(**changes)
    with pytest.raises(Unauthenticated, match=told):
        authenticate_key(policy, key)
    with pytest.raises(Unauthenticated, match="not valid"):
        authenticate_key(policy, key[:-4] + ("AAAA" if key[-4:] != "AAAA" else "BBBB"))


@given(st.text(max_size=200).map(lambda text: f"lpx_{text}"))
@settings(max_examples=300, deadline=None)
def test_any_other_text_is_no_key(text: str) -> None:
    """Whatever begins like a key and is none is refused, without an echo."""
    _, policy = with_key()
    with pytest.raises(Unauthenticated) as caught:
        authenticate_key(policy, text)
    assert len(text) < 8 or text not in caught.value.message


# Tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """A verifier whose issuer has the keys k1 (EC) and r1 (RSA)."""
    (tmp_path / "jwks.json").write_text(jwks(k1=signing_key("k1"), r1=signing_key("r1", "RSA")))
    return Tokens(policy_of(), tmp_path)


async def test_token(tokens: Tokens) -> None:
    """A signed token stands for its tenant, the second time without its signature being checked again."""
    for signed in (token(), token(signing_key("r1", "RSA"), "RS256", "r1")):
        first = await tokens.authenticate(signed)
        assert (first.tenant, first.credential) == ("acme", "token:acme")
        assert await tokens.authenticate(signed) is first


def unsigned(**header: Any) -> str:
    """A token without a signature, with this header."""
    parts = ({"typ": "JWT"} | header, {"iss": ISSUER, "aud": AUDIENCE, "sub": "acme", "exp": time.time() + 600})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts) + "."


def signed_with_public_key() -> str:
    """HS256 with the issuer's public key, which everybody has, as the password (a confusion of keys)."""
    body = unsigned(alg="HS256", kid="r1")[:-1]
    signature = hmac.new(public_pem(signing_key("r1", "RSA")), body.encode(), hashlib.sha256).digest()
    return f"{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


BAD_TOKENS = {
    "alg none": lambda: unsigned(alg="none"),
    "alg None": lambda: unsigned(alg="None", kid="k1"),
    "no alg": lambda: unsigned(kid="k1"),
    "public key as password": signed_with_public_key,
    "key of the other kind": lambda: token(kid="r1"),
    "unknown key id": lambda: token(kid="k9"),
    "no key id where there are two keys": lambda: token(kid=None),
    "another's key under this id": lambda: token(signing_key("stranger")),
    "algorithm that is not allowed": lambda: token(signing_key("r1", "RSA"), "PS256", "r1"),
    "expired": lambda: token(exp=int(time.time()) - 60),
    "not valid yet": lambda: token(nbf=int(time.time()) + 60),
    "without an end": lambda: token(exp=None),
    "for another audience": lambda: token(aud="others"),
    "without an audience": lambda: token(aud=None),
    "of another issuer": lambda: token(iss="https://evil.test"),
    "without an issuer": lambda: token(iss=None),
    "of an unknown tenant": lambda: token(sub="nobody"),
    "without a tenant": lambda: token(sub=None),
    "a list as tenant": lambda: jwt.encode(
        {"iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 600, "sub": ["acme"]},
        signing_key("k1"),
        "ES256",
        {"kid": "k1"},
    ),
    "cut": lambda: token()[:-20],
    "three dots": lambda: "...",
    "empty": lambda: "",
    "not ASCII": lambda: "é.é.é",
    "no text at all": lambda: b"\xff\xfe.\xff.\xff".decode(errors="surrogateescape"),
    "nested JSON": lambda: base64.urlsafe_b64encode(b"[" * 5000).decode() + ".e30.e30",
}


@pytest.mark.parametrize("name", BAD_TOKENS)
async def test_bad_token(tokens: Tokens, name: str) -> None:
    """Each of these is refused as unknown, and nothing of it is repeated."""
    bad = BAD_TOKENS[name]()
    with pytest.raises(Unauthenticated) as caught:
        await tokens.authenticate(bad)
    assert len(bad) < 10 or bad[:40] not in caught.value.message


@given(st.text(alphabet='abcdefghijABCDEFGHIJ0123456789-_.={}"', max_size=300))
@settings(max_examples=300, deadline=None)
async def test_any_other_text_is_no_token(text: str) -> None:
    """Whatever is no token of the issuer is refused as such, and as nothing else."""
    with pytest.raises(Unauthenticated):
        await Tokens(policy_of(), Path("/nonexistent")).authenticate(text)


async def test_leeway(tokens: Tokens) -> None:
    """Clocks may differ by as much as the policy says."""
    assert (await tokens.authenticate(token(exp=int(time.time()) - 1))).tenant == "acme"


async def test_issuers_keys_change(tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key is fetched when a token names it, but not at every call; keys that cannot be read leave the last ones."""
    await tokens.authenticate(token())
    new = token(signing_key("k2"), kid="k2")
    with pytest.raises(Unauthenticated):
        await tokens.authenticate(new)
    (tmp_path / "jwks.json").write_text(jwks(k1=signing_key("k1"), k2=signing_key("k2")))
    with pytest.raises(Unauthenticated):  # it was looked at a moment ago
        await tokens.authenticate(new)
    monkeypatch.setattr("engine.server.identity.tokens._PATIENCE_S", 0.0)
    assert (await tokens.authenticate(new)).tenant == "acme"
    (tmp_path / "jwks.json").write_text("{")
    with pytest.raises(Unauthenticated):
        await tokens.authenticate(token(kid="k3"))
    assert (await tokens.authenticate(token(signing_key("k2"), kid="k2", jti="another"))).tenant == "acme"


async def test_tenant_by_claim(tmp_path: Path) -> None:
    """Another claim may name the tenant, by a table in the policy; what is not in the table is nobody."""
    (tmp_path / "jwks.json").write_text(jwks(k1=signing_key("k1")))
    given = policy_of().model_dump(mode="json")
    given["issuers"][0] |= {"tenant_claim": "org", "tenants": {"Acme Inc.": "acme"}}
    tokens = Tokens(Policy.model_validate(given), tmp_path)
    found = await tokens.authenticate(token(org="Acme Inc.", sub="bob\nadmin"))
    assert (found.tenant, found.credential) == ("acme", "token:bobadmin")  # it may stand in a log
    with pytest.raises(Unauthenticated):
        await tokens.authenticate(token(org="acme"))


async def test_revoked_token(tmp_path: Path) -> None:
    """A token that the policy revokes counts no more from the policy's next reading on; the issuer's others do."""
    (tmp_path / "jwks.json").write_text(jwks(k1=signing_key("k1")))
    given = policy_of().model_dump(mode="json")
    before = Tokens(Policy.model_validate(given), tmp_path)
    stolen, own = token(jti="stolen"), token(jti="own")
    assert (await before.authenticate(stolen)).tenant == "acme"
    given["issuers"][0]["revoked"] = ["stolen"]
    after = Tokens(Policy.model_validate(given), tmp_path, before)
    with pytest.raises(Unauthenticated, match="revoked"):
        await after.authenticate(stolen)
    assert (await after.authenticate(own)).tenant == "acme"


async def test_symmetric_and_private_keys_in_a_key_set_are_not_used(tmp_path: Path) -> None:
    """A key set that holds a password or a private key does not make them keys that tokens are checked with."""
    private = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(signing_key("k1"))) | {"kid": "k1"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [private, {"kty": "oct", "k": "c2VjcmV0", "kid": "o"}]}))
    tokens = Tokens(policy_of(), tmp_path)
    for bad in (token(), token("secret" * 6, "HS256", "o")):
        with pytest.raises(Unauthenticated):
            await tokens.authenticate(bad)


# Certificates


def test_certificate() -> None:
    """A certificate stands for the tenant by one of its names."""
    authority = Authority()
    named = authority.issue("acme-backend", "spiffe://test/acme")[0]
    for name in ("spiffe://test/acme", "CN=acme-backend"):
        found = authenticate_certificate(policy_of(certificates=[name]), named)
        assert (found.tenant, found.credential) == ("acme", f"certificate:{name}")


def test_certificate_that_stands_for_nobody() -> None:
    """Neither an unknown name, nor an expired certificate, nor one that two tenants could claim, is let in."""
    authority = Authority()
    cases = [
        authority.issue("acme2")[0],
        authority.issue("acme", days=-1)[0],
        authority.issue("CN=acme")[0],
        authority.issue("acme", "spiffe://test/other")[0],
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ]
    tenants = {"acme": {"certificates": ["CN=acme"]}, "other": {"certificates": ["spiffe://test/other"]}}
    policy = Policy.model_validate({"version": 1, "tenants": tenants})
    for certificate in cases:
        with pytest.raises(Unauthenticated):
            authenticate_certificate(policy, certificate)
