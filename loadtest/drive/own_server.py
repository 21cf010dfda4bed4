"""A server of our own: `loraplex serve` as a process, with adapters published, for the time of a run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM, Signals

import psutil

from engine.client import AsyncClient, RequestError
from loadtest.drive.fleet import fleet
from loadtest.drive.markers import write_marker
from loadtest.drive.processes import below
from loadtest.errors import BadInput, TargetGone
from loadtest.plan.scenario import Case
from loadtest.ports import free_port

_START_S = 240.0
_ENGINE = "VLLM::"  # how vLLM's own processes call themselves


class OwnServer:
    """The process, its registry and its folder. `chaos` may kill, stop and restart it; it always comes back."""

    def __init__(self, folder: Path, model: Path, settings: dict[str, object]) -> None:
        self.folder = folder
        self.registry = folder / "registry"
        self.port = free_port()
        self.template: Path | None = None
        flags = {
            "model": model,
            "registry": self.registry,
            "cache": folder / "cache",
            "port": self.port,
            "http-port": 0,
        }
        merged = {name.replace("_", "-"): value for name, value in (flags | settings).items()}
        self._command = [sys.executable, "-P", "-m", "engine.cli", "serve", "--log-format", "json"]
        self._command += [f"--{name}={value}" for name, value in merged.items()]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process. Raises TargetGone if it was not started."""
        if self.process is None:
            raise TargetGone("the server was not started")
        return self.process.pid

    def start(self) -> None:
        """Start the process (again)."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603 - our own command

    async def ready(self) -> None:
        """Wait until it serves; TargetGone with its last words if it ends instead."""
        async with AsyncClient(self.address) as client:
            waiting = asyncio.create_task(client.wait_ready(timeout_s=_START_S))
            while not waiting.done():
                await asyncio.wait([waiting], timeout=0.3)
                if self.process and self.process.poll() is not None:
                    waiting.cancel()
                    raise TargetGone(f"loraplex serve ended: {(self.folder / 'server.log').read_text()[-1500:]}")
            await waiting

    def signal(self, number: Signals) -> None:
        """Send a signal to the server and all processes that it started."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def signal_engine(self, number: Signals) -> str:
        """Send a signal to the processes of the engine alone; returns their names. Raises BadInput when there are none."""
        names = []
        for child in below(self.process.pid, [_ENGINE]) if self.process else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                name = (child.cmdline() or [""])[0]
                if name.startswith(_ENGINE):
                    child.send_signal(number)
                    names.append(name.removeprefix(_ENGINE))
        if not names:
            raise BadInput("the engine has no process of its own", "Serve a model with --engine vllm.")
        return ", ".join(sorted(names))

    def stop(self) -> None:
        """End it: politely, then not."""
        if not self.process:
            return
        self.signal(SIGCONT)
        self.process.send_signal(SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.signal(SIGKILL)
        self.process.wait(10)

    @contextlib.contextmanager
    def without_registry(self) -> Iterator[None]:
        """The registry's folder is somewhere else for the time of the block."""
        away = self.registry.with_name("registry-away")
        self.registry.rename(away)
        try:
            yield
        finally:
            # The server may have made the folder anew meanwhile; what it wrote there belongs to the fault.
            if self.registry.exists():
                self.registry.rename(self.registry.with_name(f"registry-made-anew-{time.monotonic_ns()}"))
            away.rename(self.registry)

    async def publish(self, name: str, seed: int, rank: int = 8, *, broken: bool = False) -> str:
        """Publish a marker adapter; returns its version."""
        if self.template is None:
            raise BadInput("publishing needs an adapter to take shapes from", "Give --adapter FOLDER.")
        folder = self.folder / f"marker-{name}-{seed}"
        write_marker(self.template, folder, seed, rank, broken=broken)
        try:
            async with AsyncClient(self.address, timeout_s=120) as client:
                return (await client.adapters.publish(folder, name, publisher="loadtest")).version
        finally:
            shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def own_server(
    model: Path,
    adapters: Sequence[Path],
    cases: Sequence[Case],
    engine: str = "vllm",
    settings: Mapping[str, object] | None = None,
) -> AsyncIterator[OwnServer]:
    """Start a server that has what the cases need: `adapters` published as their folders are named, and markers."""
    needed: dict[str, object] = {"engine": engine} | dict(settings or {})
    for case in cases:
        for name, value in case.server.settings.items():
            if needed.setdefault(name, value) != value:
                raise BadInput(f"{case.title} needs {name}={value}, another scenario {needed[name]}", "Run them apart.")
    with tempfile.TemporaryDirectory(prefix="loraplex-loadtest-") as folder:
        server = OwnServer(Path(folder), model, needed)
        server.template = adapters[0] if adapters else None
        server.start()
        try:
            await server.ready()
            await _publish_all(server, fleet(adapters, cases, Path(folder) / "markers"))
            yield server
        finally:
            server.stop()


async def _publish_all(server: OwnServer, folders: Mapping[str, Path]) -> None:
    async with AsyncClient(server.address, timeout_s=120) as client:
        for name, folder in folders.items():
            try:
                await client.adapters.publish(folder, name, publisher="loadtest")
            except (RequestError, OSError) as error:
                raise BadInput(f"cannot publish {folder} as {name}: {error}") from error
