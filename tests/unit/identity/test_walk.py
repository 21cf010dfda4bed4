"""docs/security.md, from an empty folder to a promoted adapter behind TLS with a quota: its very commands, one by one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.client.testing import write_adapter, write_base
from tests.unit.cli.calls import call

ROOT = Path(__file__).parents[3]


def commands() -> Iterator[str]:
    """The page's commands; lines without a `$` belong to the one before them."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "security.md").read_text(), re.DOTALL)
    for block in blocks:
        yield from (command.strip() for command in re.split(r"(?m)^\$ ", block) if command.strip())


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nothing but a base model and an adapter, and no settings from outside."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "examples" / "support" / "v1")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LORAPLEX_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_page(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command works, or is refused where and as the page says."""
    server = None
    try:
        for command in commands():
            if command.startswith("loraplex serve"):
                server, port = serve(empty_machine, command)
            elif command.startswith("export "):
                for setting in shlex.split(command)[1:]:
                    monkeypatch.setenv(*setting.replace("50051", str(port)).split("=", 1))
            elif command.startswith("loraplex "):
                ours(command)
            else:
                subprocess.run(["bash", "-euc", command], check=True, capture_output=True, timeout=20)
    finally:
        if server:
            server.terminate()
            server.wait(20)
    acts = [json.loads(line) for line in (empty_machine / "audit.jsonl").read_text().splitlines()]
    told = [(act["tenant"], act["method"], act["result"]) for act in acts]
    assert told == [
        ("operations", "PublishAdapter", "OK"),
        ("operations", "SetAlias", "OK"),
        ("acme", "RollbackAlias", "PERMISSION_DENIED"),
    ]


def ours(command: str) -> None:
    """Run a command of ours in this process; a comment at its end says with which reason it is refused."""
    command, _, reason = command.partition("#")
    command, _, output = command.partition(" > ")
    words = shlex.split(command)[1:]
    done = call(*words, *(["--json"] if reason else []))
    if reason:
        assert json.loads(done.err)["error"]["reason"] == reason.strip(), command
    else:
        assert done.code == 0, (command, done.err)
    if output:
        Path(output.strip()).write_text(done.out)


def serve(folder: Path, command: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the server, with made-up answers and on a free port, and wait until it is ready."""
    words = shlex.split(command.removesuffix("&"))[1:]
    own = ["--engine", "fake", "--model", "base", "--port", "0", "--http-port", "0", "--log-format", "json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "engine.cli", *words, *own], stderr=log, env=environment)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = re.search(r'"address": "0.0.0.0:(\d+)"', (folder / "server.log").read_text())
        if found:
            return server, int(found[1])
        assert server.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.05)
    server.kill()
    raise TimeoutError
