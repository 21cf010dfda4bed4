"""Signatures of adapter folders, in the format of the OpenSSF's model-signing, with keys of one's own and no network.

The signature is a file of the folder, so that it travels with a version wherever that goes; it covers all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import BadConfiguration, Unsigned

SIGNATURE = "model.sig.json"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # that model-signing takes


def sign(folder: Path, private_key: Path) -> None:
    """Write the folder's signature with an EC private key (PEM); raises BadConfiguration when the key cannot be used."""
    from model_signing import hashing, signing

    (folder / SIGNATURE).unlink(missing_ok=True)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.set_hashing_config(_covered(hashing.Config(), folder)).sign(folder, folder / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise BadConfiguration(f"the key {private_key.name} cannot sign: {error}", fix=_KEYS) from error


def verify(folder: Path, public_key: Path, what: str) -> None:
    """Raise Unsigned unless the folder has a signature by this key over every other file, as they are now."""
    from model_signing import hashing, verifying

    if not (folder / SIGNATURE).is_file():
        raise Unsigned(what, "it has no signature")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_covered(hashing.Config(), folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises what its own libraries do
        raise Unsigned(what, "its signature is not by this key, or a file has changed since") from error


def check_signing_key(private_key: Path) -> None:
    """Raise BadConfiguration when a private key cannot be used to sign."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise BadConfiguration(f"the key {private_key.name} cannot sign: {error}", fix=_KEYS) from error
    if problem := _unsupported(key):
        raise BadConfiguration(f"the key {private_key.name} cannot sign: {problem}", fix=_KEYS)


def check_key(public_key: Path) -> None:
    """Raise BadConfiguration when a public key cannot be read, or no signature can be by it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise BadConfiguration(f"require_signature: {public_key} is no public key", fix=_KEYS) from error
    if problem := _unsupported(key):
        raise BadConfiguration(f"require_signature: {public_key} cannot verify: {problem}", fix=_KEYS)


def _unsupported(key: object) -> str:
    """Why signatures cannot be by a key, or its private half; empty when they can."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

    if not isinstance(key, EllipticCurvePrivateKey | EllipticCurvePublicKey):
        return "it is not of an elliptic curve"
    if key.curve.name not in _CURVES:
        return f"its curve is {key.curve.name}, and not one of {', '.join(_CURVES)}"
    return ""


def _covered(config: Any, folder: Path) -> Any:
    """Everything but the signature itself."""
    return config.set_ignored_paths(paths=[folder / SIGNATURE])


_KEYS = (
    "Make a pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
    "openssl ec -in key.pem -pubout -out key.pub"
)
