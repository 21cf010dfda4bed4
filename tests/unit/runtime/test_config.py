"""Settings: where they come from, who wins, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import Settings, load_settings, parse_weights
from engine.errors import BadConfiguration


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting comes from outside the test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LORAPLEX_{name.upper()}", raising=False)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    """A file that sets three things."""
    file = tmp_path / "loraplex.yaml"
    file.write_text("port: 6001\nhttp_port: 6002\nmax_running: 7\n")
    return file


def test_defaults() -> None:
    """Nothing is needed: loopback, the usual ports."""
    settings = load_settings()
    assert (settings.host, settings.port, settings.http_port) == ("127.0.0.1", 50051, 9090)


def test_precedence(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults give way to the file, the file to the environment, the environment to flags."""
    monkeypatch.setenv("LORAPLEX_HTTP_PORT", "7002")
    monkeypatch.setenv("LORAPLEX_MAX_RUNNING", "8")
    settings = load_settings(yaml_file, max_running=9)
    assert (settings.max_waiting, settings.port, settings.http_port, settings.max_running) == (256, 6001, 7002, 9)


def test_a_flag_that_is_not_given(yaml_file: Path) -> None:
    """None means: not given."""
    assert load_settings(yaml_file, port=None).port == 6001


def test_false_and_zero_are_given() -> None:
    """False and 0 are values, not absences."""
    settings = load_settings(reflection=False, port=0)
    assert settings.reflection is False
    assert settings.port == 0


@pytest.mark.parametrize("text", ["prot: 1\n", "port: 1\nworkers: 4\nspeed: 9\n"])
def test_unknown_setting_in_the_file(tmp_path: Path, text: str) -> None:
    """A misspelled setting is told, not ignored."""
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadConfiguration, match=r"unknown setting (prot|speed, workers)"):
        load_settings(file)


def test_unknown_flag() -> None:
    """So is a misspelled flag."""
    with pytest.raises(BadConfiguration, match="prot"):
        load_settings(prot=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("port", -1),
        ("port", "many"),
        ("max_running", 0),
        ("drain_s", -1),
        ("refresh_s", 0),
        ("load_timeout_s", "soon"),
        ("context_length", 1),
        ("engine", "llama.cpp"),
        ("dtype", "int8"),
        ("log_level", "loud"),
        ("registry", "ftp://somewhere"),
        ("tenant_weights", "gold"),
        ("tenant_weights", "gold=many"),
        ("tenant_weights", "gold=0"),
        ("tenant_weights", "gold=nan"),
        ("tenant_weights", "a=1,a=2"),
        ("tenant_weights", "../x=1"),
        ("max_wait_s", 0),
        ("max_adapter_wait_s", 0),
    ],
)
def test_wrong_value(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value is refused by name wherever it comes from; it never silently becomes the default."""
    with pytest.raises(BadConfiguration, match=name):
        load_settings(**{name: value})
    monkeypatch.setenv(f"LORAPLEX_{name.upper()}", str(value))
    with pytest.raises(BadConfiguration, match=name):
        load_settings()


def test_tenant_weights() -> None:
    """Weights are a list of names and numbers; left out, there are none."""
    assert parse_weights(load_settings(tenant_weights="gold=4, batch=0.5").tenant_weights) == {"gold": 4, "batch": 0.5}
    assert parse_weights(load_settings().tenant_weights) == {}


def test_every_wrong_value_is_told() -> None:
    """All mistakes come at once."""
    with pytest.raises(BadConfiguration) as refusal:
        load_settings(port=-1, max_running=0)
    assert "port" in refusal.value.message
    assert "max_running" in refusal.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_reachable_host(host: str) -> None:
    """Other machines reach a server only by TLS and with credentials, or when somebody says so in so many words."""
    tls = {"tls_certificate": "tls.crt", "tls_key": "tls.key"}
    for known in ({"policy": "policy.yaml"}, tls):
        with pytest.raises(BadConfiguration, match="--allow-remote"):
            load_settings(host=host, **known)
    for enough in ({"allow_remote": True}, tls | {"policy": "policy.yaml"}, tls | {"tls_client_ca": "ca.crt"}):
        assert load_settings(host=host, **enough).host == host


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tls_certificate": "tls.crt"}, "tls_key"),
        ({"tls_client_ca": "ca.crt"}, "tls_certificate"),
        ({"policy": "policy.yaml", "tenant_weights": "a=2"}, "weights"),
    ],
)
def test_settings_of_identity_that_do_not_go_together(given: dict[str, str], told: str) -> None:
    """Half of a pair, or two places for one thing, are told."""
    with pytest.raises(BadConfiguration, match=told):
        load_settings(**given)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_host(host: str) -> None:
    """Loopback is always fine."""
    assert load_settings(host=host).host == host


def test_host_that_only_begins_like_loopback() -> None:
    """A name is no loopback address because it begins with 127."""
    with pytest.raises(BadConfiguration):
        load_settings(host="127.evil.example.org")


def test_rank_that_vllm_does_not_know() -> None:
    """The real engine knows some ranks only; the fake engine takes any."""
    with pytest.raises(BadConfiguration, match="max_rank must be one of 1, 8, 16"):
        load_settings(max_rank=12)
    assert load_settings(max_rank=12, engine="fake").max_rank == 12


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("- a\n- b\n", "name: value"),
        ("port: [", "is not YAML"),
        ("port: !!bool x", "is not YAML"),
        (None, "cannot read"),
    ],
)
def test_bad_file(tmp_path: Path, content: str | None, problem: str) -> None:
    """A file that is missing, no YAML or no mapping is refused."""
    file = tmp_path / "bad.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadConfiguration, match=problem):
        load_settings(file)


def test_empty_file(tmp_path: Path) -> None:
    """An empty file sets nothing."""
    (tmp_path / "empty.yaml").touch()
    assert load_settings(tmp_path / "empty.yaml") == load_settings()


def test_frozen() -> None:
    """What the server started with is what it runs with."""
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]
