"""`serve`: every setting is a flag, and wrong ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import Settings
from engine.server import app
from tests.unit.cli.calls import call


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `serve` was called with, instead of serving."""
    calls: list[Settings] = []

    async def record(settings: Settings) -> None:
        calls.append(settings)

    monkeypatch.setattr(app, "serve", record)
    return calls


def test_every_setting_is_a_flag_with_its_default_and_variable() -> None:
    """No setting is left out of --help."""
    shown = " ".join(call("serve", "--help").out.replace("│", " ").split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in shown
        assert f"LORAPLEX_{name.upper()}" in shown.replace(" ", "")
    for panel in ("What to serve", "Where to listen", "The engine", "Bounds", "Logs"):
        assert panel in shown


def test_flags_beat_the_environment_beats_the_file(
    served: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source overrides the one below it."""
    (tmp_path / "loraplex.yaml").write_text("port: 1\nhttp_port: 2\nmax_rank: 32\nprefix_cache: false\n")
    monkeypatch.setenv("LORAPLEX_HTTP_PORT", "3")
    monkeypatch.setenv("LORAPLEX_DRAIN_S", "4")
    done = call(
        "serve", "--config", tmp_path / "loraplex.yaml", "--drain-s", "5", "--engine", "fake", "--no-reflection",
        "--model", tmp_path,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    (settings,) = served
    assert (settings.port, settings.http_port, settings.drain_s, settings.max_rank) == (1, 3, 5.0, 32)
    assert (settings.engine, settings.reflection, settings.prefix_cache) == ("fake", False, False)
    assert (settings.model, settings.max_resident) == (tmp_path, Settings.model_fields["max_resident"].default)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--port", "70000"), "port: "),
        (("--host", "0.0.0.0"), "add --allow-remote"),
        (("--registry", "ftp://x"), "unknown scheme"),
    ],
)
def test_a_wrong_setting_is_named(served: list[Settings], words: tuple[str, ...], problem: str) -> None:
    """The setting and the way out are named; nothing is served."""
    refused = call("serve", *words)
    assert (refused.code, served) == (1, [])
    assert refused.err.startswith("error: ")
    assert problem in refused.err
    assert "fix: See `loraplex serve --help`" in refused.err


def test_an_unknown_setting_in_the_file_is_named(served: list[Settings], tmp_path: Path) -> None:
    """A typing error in the YAML file is found."""
    (tmp_path / "loraplex.yaml").write_text("prot: 1\n")
    refused = call("serve", "--config", tmp_path / "loraplex.yaml")
    assert (refused.code, served) == (1, [])
    assert "unknown setting prot" in refused.err


def test_no_model(tmp_path: Path) -> None:
    """The real server refuses to start without a model."""
    refused = call("serve", "--engine", "fake", "--port", "0", "--http-port", "0", "--model", tmp_path / "none")
    assert refused.code == 1
    assert "error: no base model in" in refused.err
    assert "fix: Point --model at a folder" in refused.err
