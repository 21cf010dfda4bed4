"""API keys: `lpx_ID_SECRET`. The id is public; of the secret, 256 random bits, only a SHA-256 is kept.

A slow hash as for passwords would add nothing: nobody guesses 256 bits, and every call would pay for it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime

from engine.errors import Unauthenticated
from engine.server.identity.policy import ApiKey, Policy
from engine.server.identity.principal import Principal

PREFIX = "lpx_"  # lets scanners of source code and logs recognise a leaked key
_KEY = re.compile(r"lpx_([a-z0-9]{8,32})_([A-Za-z0-9_-]{43})")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_NOBODY = "0" * 64


def new_key(expires: datetime | None = None, note: str = "") -> tuple[str, ApiKey]:
    """A new key, and what the policy keeps of it."""
    identity = secrets.choice(_LETTERS[:26]) + "".join(secrets.choice(_LETTERS) for _ in range(11))  # no number in YAML
    secret = secrets.token_urlsafe(32)
    return f"{PREFIX}{identity}_{secret}", ApiKey(id=identity, sha256=_digest(secret), expires=expires, note=note)


def parse_key(key: str) -> tuple[str, str]:
    """A key's id and the digest of its secret. Raises Unauthenticated if it is none."""
    if found := _KEY.fullmatch(key):
        return found[1], _digest(found[2])
    raise Unauthenticated("the API key is not of the form lpx_ID_SECRET")


def authenticate_key(policy: Policy, key: str) -> Principal:
    """Who has the key. Raises Unauthenticated; that it has expired or is revoked is told only to who has all of it."""
    identity, digest = parse_key(key)
    tenant, known = policy.keys.get(identity, ("", None))
    if not hmac.compare_digest(digest, known.sha256 if known else _NOBODY) or known is None:
        raise Unauthenticated("the API key is not valid")
    if known.revoked:
        raise Unauthenticated(f"the API key {identity} is revoked")
    if known.expires and datetime.now(UTC) >= known.expires:
        raise Unauthenticated(f"the API key {identity} has expired")
    return policy.principal(tenant, f"key:{identity}")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
