"""Tokens of an identity provider (JWT, OIDC): signed by a key of which we know the public half.

PyJWT verifies; the algorithm comes from the policy's list and has to fit the kind of key, so neither `none` nor a public key
used as a password gets through. Verified tokens are remembered, as checking a signature costs more than all the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jwt
import structlog

from engine.errors import Unauthenticated
from engine.server.identity.policy import Issuer, Policy
from engine.server.identity.principal import Principal

log = structlog.get_logger(__name__)

_FRESH_S = 300.0  # for which fetched keys are used without asking again
_PATIENCE_S = 10.0  # between two fetches, whatever comes: a stranger's key id must not make us knock at every call
_TIMEOUT_S = 5.0
_MOST_REMEMBERED = 4096
_REQUIRED = ["exp", "iss", "aud"]
_INVALID = "the token is not valid"


class Tokens:
    """Verifies tokens for one policy; `folder` is where its relative paths begin. The keys of `before` need no new fetch."""

    def __init__(self, policy: Policy, folder: Path, before: Tokens | None = None) -> None:
        self._policy = policy
        known = {keys.source: keys for _, keys in before._issuers.values()} if before else {}
        self._issuers: dict[str, tuple[Issuer, _Keys]] = {
            issuer.issuer: (issuer, known.get(issuer.jwks) or _Keys(issuer.jwks, folder)) for issuer in policy.issuers
        }
        self._verified: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()

    async def authenticate(self, token: str) -> Principal:
        """Who the token stands for. Raises Unauthenticated."""
        if not token.isascii():  # every token is; HTTP lets through what is no text at all, and cannot be hashed
            raise Unauthenticated("the token is malformed")
        digest = hashlib.sha256(token.encode()).digest()
        until, known = self._verified.get(digest, (0.0, None))
        if known and time.time() < until:
            return known
        issuer, keys = self._issuer(token)
        claims = await self._claims(token, issuer, keys)
        if issuer.revoked and str(claims.get("jti")) in issuer.revoked:
            raise Unauthenticated("the token was revoked")
        principal = self._principal(claims, issuer)
        # No longer than its keys are believed, so that an issuer can take one back.
        self._remember(digest, min(float(claims["exp"]) + issuer.leeway_s, time.time() + _FRESH_S), principal)
        return principal

    def _issuer(self, token: str) -> tuple[Issuer, _Keys]:
        """Whose keys to try: what the unverified token says, which the verified one has to say again."""
        try:
            claims = jwt.decode(token, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise Unauthenticated("the token is malformed") from error
        found = self._issuers.get(str(claims.get("iss", "")))
        if found is None:
            raise Unauthenticated(_INVALID)
        return found

    async def _claims(self, token: str, issuer: Issuer, keys: _Keys) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in issuer.algorithms:
                raise Unauthenticated(_INVALID)
            key = await keys.find(header.get("kid"), header["alg"])
            return dict(
                jwt.decode(
                    token,
                    key,
                    algorithms=sorted(issuer.algorithms),
                    audience=issuer.audience,
                    issuer=issuer.issuer,
                    leeway=issuer.leeway_s,
                    options={"require": _REQUIRED, "enforce_minimum_key_length": True},
                )
            )
        except jwt.ExpiredSignatureError as error:  # found out only after the signature was found to be right
            raise Unauthenticated("the token has expired") from error
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise Unauthenticated(_INVALID) from error

    def _principal(self, claims: dict[str, Any], issuer: Issuer) -> Principal:
        value = claims.get(issuer.tenant_claim)
        tenant = issuer.tenants.get(value) if issuer.tenants and isinstance(value, str) else value
        if not isinstance(tenant, str) or tenant not in self._policy.tenants:
            raise Unauthenticated(f"the token's claim {issuer.tenant_claim!r} stands for no tenant")
        return self._policy.principal(tenant, f"token:{_printable(claims.get('sub', value))}")

    def _remember(self, digest: bytes, until: float, principal: Principal) -> None:
        self._verified[digest] = (until, principal)
        if len(self._verified) > _MOST_REMEMBERED:
            self._verified.popitem(last=False)


class _Keys:
    """An issuer's public keys, from a file or a URL; the last good ones stay when it is gone."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source = source
        self._file = (
            None if "://" in source and not source.startswith("file:") else folder / source.removeprefix("file://")
        )
        self._keys: list[dict[str, Any]] = []
        self._looked = -_FRESH_S
        self._busy = asyncio.Lock()

    async def find(self, identity: object, algorithm: str) -> jwt.PyJWK:
        """The key of this id; the only one if the token names none. Raises Unauthenticated or PyJWTError."""
        if time.monotonic() - self._looked >= _FRESH_S:
            await self._look(_FRESH_S)
        found = self._among(identity)
        if found is None:  # it may be a new one
            await self._look(_PATIENCE_S)
            found = self._among(identity)
        if found is None or found.get("alg", algorithm) != algorithm:
            raise Unauthenticated(_INVALID)
        return jwt.PyJWK(found, algorithm)

    def _among(self, identity: object) -> dict[str, Any] | None:
        fitting = [key for key in self._keys if identity is None or key.get("kid") == identity]
        return fitting[0] if len(fitting) == 1 else None

    async def _look(self, at_least_s: float) -> None:
        async with self._busy:
            if time.monotonic() - self._looked < at_least_s:
                return  # somebody else just did
            self._looked = time.monotonic()
            try:
                self._keys = await asyncio.to_thread(self._fetch)
            except (OSError, jwt.PyJWTError, ValueError) as error:
                log.critical(
                    "an issuer's keys cannot be read: the last ones stay", source=self.source, why=str(error)[:200]
                )

    def _fetch(self) -> list[dict[str, Any]]:
        if self._file is not None:
            found = json.loads(self._file.read_bytes())
        else:
            found = jwt.PyJWKClient(self.source, cache_jwk_set=False, timeout=_TIMEOUT_S).fetch_data()
        keys = found.get("keys") if isinstance(found, dict) else None
        if not isinstance(keys, list):
            raise jwt.PyJWKSetError("it is no set of JSON Web Keys")
        return [key for key in keys if isinstance(key, dict) and _is_public(key)]


def _is_public(key: dict[str, Any]) -> bool:
    """Whether it is the public half of a signing key: symmetric keys and private halves have no place there."""
    return key.get("kty") in ("RSA", "EC", "OKP") and key.get("use", "sig") == "sig" and "d" not in key


def _printable(value: object) -> str:
    """A claim as it may stand in a log: no control characters, not endless."""
    return "".join(letter for letter in str(value) if letter.isprintable())[:100]
