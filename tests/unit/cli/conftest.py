"""The command line, called as a user calls it: against a fake server on a real socket, or on a registry in a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from engine.client.testing import FakeServer, fake_server, write_adapter, write_base
from engine.server import logs


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever LORAPLEX_* or .loraplex is around is none of a test's business."""
    for name in ("LORAPLEX_SERVER", "LORAPLEX_MODEL", "LORAPLEX_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def silent_server() -> None:
    """The fake server shares this process: what it logs is no output of the command."""
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=silent, cache_logger_on_first_use=False)


@pytest.fixture(autouse=True)
def no_log_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` configures the process's logs; the next test should not notice."""
    monkeypatch.setattr(logs, "configure", lambda _: None)


@pytest.fixture(scope="session")
def server() -> Iterator[FakeServer]:
    """One fake server for all tests: each uses adapter names of its own."""
    with fake_server(refresh_s=0.1) as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny base model."""
    write_base(tmp_path / "tiny-base")
    return tmp_path / "tiny-base"


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[int], Path]:
    """Makes the folder of a valid adapter; another number makes another one."""

    def make(seed: int) -> Path:
        folder = tmp_path / f"adapter-{seed}"
        if folder.exists():
            return folder
        write_adapter(folder, seed=seed)
        run = {"run_id": f"run-{seed}", "evaluation": {"metric": "exact match", "adapter": seed / 10, "base": 0.0}}
        (folder / "run.json").write_text(json.dumps(run))
        return folder

    return make


@pytest.fixture(params=["server", "registry"])
def where(request: pytest.FixtureRequest, tmp_path: Path, model: Path) -> tuple[str, ...]:
    """How a command is told where to work: through a server, or on a registry."""
    if request.param == "server":
        return ("--server", request.getfixturevalue("server").target)
    return ("--registry", str(tmp_path / "registry"))
