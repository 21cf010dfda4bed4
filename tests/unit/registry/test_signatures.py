"""Signatures: a server that requires one publishes and loads nothing without it, nor anything changed since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from engine.client.testing import FakeServer, fake_server, write_adapter
from engine.errors import BadConfiguration, Unsigned
from engine.registry.signatures import SIGNATURE, check_key, check_signing_key, sign, verify
from tests.unit.cli.calls import call


def write_keys(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """A key pair, private and public."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    private.write_bytes(key.private_bytes(pem, kind, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The operator's key pair."""
    return write_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def strict(keys: tuple[Path, Path]) -> Iterator[FakeServer]:
    """A server that requires a signature by it."""
    with fake_server(require_signature=keys[1], refresh_s=0.1) as server:
        yield server


def test_what_was_signed_is_verified_and_what_was_changed_is_not(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """A changed file, an added one, another key, no signature at all."""
    private, public = keys
    write_adapter(tmp_path / "a")
    with pytest.raises(Unsigned, match="no signature"):
        verify(tmp_path / "a", public, "it")
    sign(tmp_path / "a", private)
    verify(tmp_path / "a", public, "it")
    with pytest.raises(Unsigned):
        verify(tmp_path / "a", write_keys(tmp_path, "other")[1], "it")
    config = tmp_path / "a" / "adapter_config.json"
    before = config.read_bytes()
    config.write_bytes(before + b" ")
    with pytest.raises(Unsigned, match="a file has changed"):
        verify(tmp_path / "a", public, "it")
    config.write_bytes(before)
    (tmp_path / "a" / "more.txt").write_text("x")
    with pytest.raises(Unsigned):
        verify(tmp_path / "a", public, "it")


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    """When the server starts, and when something is to be signed; with how to make one."""
    (tmp_path / "key").write_text("nonsense")
    write_adapter(tmp_path / "a")
    with pytest.raises(BadConfiguration, match="no public key") as caught:
        check_key(tmp_path / "key")
    assert "openssl" in caught.value.fix
    with pytest.raises(BadConfiguration, match="cannot sign"):
        sign(tmp_path / "a", tmp_path / "key")


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1(), ec.BrainpoolP256R1()]
)
def test_a_key_passes_its_check_when_it_can_sign(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    """By its curve: the check comes before hours of training, signing after them; the server's key goes with it."""
    private, public = write_keys(tmp_path, "key", curve)
    write_adapter(tmp_path / "a")
    try:
        sign(tmp_path / "a", private)
    except BadConfiguration:
        for check, key in ((check_signing_key, private), (check_key, public)):
            with pytest.raises(BadConfiguration, match=f"its curve is {curve.name}"):
                check(key)
    else:
        check_signing_key(private)
        check_key(public)
        verify(tmp_path / "a", public, "it")


def test_a_strict_server_publishes_only_what_is_signed(
    strict: FakeServer, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """Unsigned or signed by somebody else: refused. The user's own folder gets no signature file."""
    write_adapter(tmp_path / "a")
    words = ("adapters", "publish", tmp_path / "a", "sealed", "--server", strict.target)
    refused = call(*words)
    assert (refused.code, "no signature" in refused.err) == (1, True)
    other, _ = write_keys(tmp_path, "other")
    assert call(*words, "--sign", other).code == 1
    assert call(*words, "--sign", keys[0]).code == 0
    assert not (tmp_path / "a" / SIGNATURE).exists()
    assert call("generate", "hi", "-a", "sealed", "--server", strict.target).code == 0


def test_a_strict_server_loads_nothing_that_came_into_the_registry_unsigned(strict: FakeServer, tmp_path: Path) -> None:
    """Whoever can write to the store is not trusted by that."""
    write_adapter(tmp_path / "a", seed=9)
    registry, model = str(strict.app.settings.registry), strict.app.settings.model
    assert call("adapters", "publish", tmp_path / "a", "smuggled", "--registry", registry, "--model", model).code == 0
    shown = call("adapters", "preload", "smuggled@v1", "--server", strict.target)
    assert (shown.code, "smuggled@v1 is refused: it has no signature" in shown.err) == (1, True)
