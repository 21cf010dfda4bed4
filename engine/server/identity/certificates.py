"""What certificates say: whose they are, and until when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from engine.errors import BadConfiguration, Unauthenticated
from engine.server.identity.policy import Policy
from engine.server.identity.principal import Principal

# What is no certificate or key, or one of a kind that is not supported.
_UNREADABLE = (ValueError, TypeError, x509.InvalidVersion, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm)


@dataclass(frozen=True)
class Certificate:
    """Its names (each subject alternative name as it is, the common name as CN=...) and the time that it is valid for."""

    names: tuple[str, ...]
    begins: datetime
    ends: datetime


def authenticate_certificate(policy: Policy, pem: bytes) -> Principal:
    """Whose the client's certificate is, which TLS has verified. Raises Unauthenticated."""
    try:
        certificate = parse_certificate(pem)
    except _UNREADABLE as error:
        raise Unauthenticated("the client certificate cannot be read") from error
    if not certificate.begins <= datetime.now(UTC) < certificate.ends:  # of a connection that outlived it
        raise Unauthenticated("the client certificate is not valid at this time")
    known = {policy.certificates[name]: name for name in certificate.names if name in policy.certificates}
    if len(known) != 1:
        raise Unauthenticated("the client certificate stands for no tenant" + (" alone" if known else ""))
    ((tenant, name),) = known.items()
    return policy.principal(tenant, f"certificate:{name}")


@lru_cache(maxsize=1024)
def parse_certificate(pem: bytes) -> Certificate:
    """Read the first certificate in `pem`. Raises what `_UNREADABLE` holds."""
    found = x509.load_pem_x509_certificate(pem)
    common = [f"CN={one.value!s}" for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    try:
        others = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Certificate(tuple(common), found.not_valid_before_utc, found.not_valid_after_utc)
    values = [value for one in others if not (value := str(getattr(one, "value", ""))).startswith("CN=")]
    return Certificate((*values, *common), found.not_valid_before_utc, found.not_valid_after_utc)


def check_pair(certificate: bytes, key: bytes) -> datetime:
    """Until when a server's certificate is valid. Raises BadConfiguration unless it is now, and is the key's own."""
    try:
        found = x509.load_pem_x509_certificate(certificate)
        its_own, begins, ends = _public(found.public_key()), found.not_valid_before_utc, found.not_valid_after_utc
    except _UNREADABLE as error:
        raise BadConfiguration("the TLS certificate is no certificate in PEM format of a supported kind") from error
    try:
        given = _public(serialization.load_pem_private_key(key, password=None).public_key())
    except _UNREADABLE as error:
        raise BadConfiguration("the TLS key is no private key in PEM format without a password") from error
    if its_own != given:
        raise BadConfiguration("the TLS key is not the certificate's")
    now = datetime.now(UTC)
    if now >= ends:
        raise BadConfiguration(f"the TLS certificate has expired on {ends:%Y-%m-%d}")
    if now < begins:
        raise BadConfiguration(f"the TLS certificate is not valid before {begins:%Y-%m-%d %H:%M} UTC")
    return ends


def check_authorities(pem: bytes) -> None:
    """Raise BadConfiguration unless `pem` holds certificates."""
    try:
        x509.load_pem_x509_certificates(pem)
    except _UNREADABLE as error:
        raise BadConfiguration("the client CA holds no certificate in PEM format") from error


def _public(key: object) -> bytes:
    encoded: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded
