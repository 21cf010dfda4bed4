"""Processes under a Ray actor, without Ray: they live as long as whoever started them, and say when they are of no use."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from loadtest.bench.child import free_port

_ROUTER = {"replicas": "127.0.0.1:1", "http_port": 0, "workers": 2}
_ACTOR = f"""
import sys, time
from pathlib import Path
from engine.cluster.ray.children import Child
child = Child("router", {_ROUTER} | {{"port": int(sys.argv[1])}}, Path(sys.argv[2]))
print(child.process.pid, flush=True)
time.sleep(60)
"""
_ALONE = [f"--{name.replace('_', '-')}={value}" for name, value in _ROUTER.items()]


@dataclass
class Supervisor:
    """A router of two processes."""

    process: psutil.Process
    port: int

    def routers(self) -> list[psutil.Process]:
        """They, without multiprocessing's own."""
        return [one for one in self.process.children() if any("spawn_main" in word for word in one.cmdline())]

    def listening(self) -> list[psutil.Process]:
        """The same, when both are there and the port is open."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                if len(found := self.routers()) == 2:
                    return found
            time.sleep(0.05)
        pytest.fail("the routers did not come up")


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """One of Python's, and all that is of its session when the block ends."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            yield started
        finally:
            kill_all(started.pid)


def kill_all(session: int) -> None:
    """Kill whoever is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def all_end(processes: list[psutil.Process], timeout_s: float) -> bool:
    """Whether they do, in time."""
    return not psutil.wait_procs(processes, timeout_s)[1]


def test_router_processes_under_ray_stay(tmp_path: Path) -> None:
    """They follow their supervisor, not the Ray worker above it; when that is killed, all end."""
    port = free_port()
    with process("-c", _ACTOR, str(port), str(tmp_path)) as actor:
        assert actor.stdout
        supervisor = Supervisor(psutil.Process(int(actor.stdout.readline())), port)
        try:
            routers = supervisor.listening()
            assert not all_end(routers[:1], 3)
            assert supervisor.routers() == routers
            actor.kill()
            assert all_end([supervisor.process, *routers], 15)
        finally:
            kill_all(supervisor.process.pid)


def test_router_processes_end_with_their_supervisor() -> None:
    """One that is killed leaves no router behind that nobody would start again, whoever started it."""
    port = free_port()
    with process("-m", "engine.cli", "router", *_ALONE, f"--port={port}", "--log-level=error") as alone:
        supervisor = Supervisor(psutil.Process(alone.pid), port)
        routers = supervisor.listening()
        alone.kill()
        assert all_end(routers, 15)
