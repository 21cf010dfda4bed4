"""Router processes: one, or several that share the gRPC port (SO_REUSEPORT: the kernel spreads connections over them)."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

import structlog
import uvloop

from engine.cluster.fleet import DnsSource, FileSource, Source, StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from engine.errors import BadConfiguration, LoraplexError
from engine.server import logs
from engine.server.process_end import END_WITH_PARENT, told_to_end

log = structlog.get_logger(__name__)

DNS = "dns:"
NOTIFY_SOCKET = "NOTIFY_SOCKET"  # environment: a datagram socket that hears of each process that is ready
_LOOK_S = 0.2  # between looks at the workers


def run(settings: RouterSettings) -> None:
    """Run until SIGTERM or SIGINT. A worker that dies is started again.

    Raises what keeps a router from starting: a worker that was never ready ends them all.
    """
    source_of(settings)  # a broken list is told once, here
    if settings.workers == 1:
        _work(settings)
        return
    asyncio.run(_supervise(settings))


def source_of(settings: RouterSettings) -> Source:
    """Where the replicas' addresses come from. Raises BadConfiguration."""
    if bool(settings.replicas) == bool(settings.fleet):
        raise BadConfiguration("say where the replicas are: either --replicas or --fleet")
    if settings.fleet:
        return FileSource(settings.fleet)
    if settings.replicas.startswith(DNS):
        return DnsSource(settings.replicas.removeprefix(DNS))
    return StaticSource(address.strip() for address in settings.replicas.split(","))


async def serve(settings: RouterSettings, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run one router in this process until SIGTERM or SIGINT; `on_ready` is called when it takes calls."""
    app = RouterApp(settings, source_of(settings))
    try:
        with told_to_end() as ending:
            await app.start()
            _tell_ready()
            on_ready()
            await ending.wait()
    finally:
        await app.stop()


def _tell_ready() -> None:
    """Tell whoever started this process, if they asked for it, that it takes calls: as systemd has it."""
    if address := os.environ.get(NOTIFY_SOCKET):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, suppress(OSError):
            told.sendto(b"READY=1", address)


def _work(settings: RouterSettings, on_ready: Callable[[], None] = lambda: None) -> None:
    logs.configure(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, on_ready))


async def _supervise(settings: RouterSettings) -> None:
    # One port of /metrics for each: the first has the one that was asked for, the others those after it.
    own = [
        settings.model_copy(update={"http_port": settings.http_port + number if settings.http_port else 0})
        for number in range(settings.workers)
    ]
    with told_to_end() as ending:
        workers = [_Worker(one) for one in own]
        try:
            while not ending.is_set():
                for worker in workers:
                    worker.look()
                with suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), _LOOK_S)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                await asyncio.to_thread(worker.process.join)


class _Worker:
    """One of the router processes, and the next one in its place."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._ready = False  # it was once, so that what ends it is no setting
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # gRPC dislikes forks
        self._said, says = spawn.Pipe(duplex=False)
        self._problem: Exception | None = None  # that it ends with
        self.process = spawn.Process(target=_work_under, args=(self._settings, os.getpid(), says))
        self.process.start()
        says.close()  # here: that end is the process's own

    def look(self) -> None:
        """Start it again if it has died. Raises what it died of if it was never ready."""
        alive = self.process.is_alive()  # asked first: what a dead one had to say is there
        self._listen()
        if alive:
            return
        code, problem = self.process.exitcode, str(self._problem or "")
        if not self._ready:
            if self._problem:
                raise self._problem
            log.error("a router process has died before it was ready", exitcode=code)
            raise SystemExit(1)
        log.error("a router process has died and is started again", exitcode=code, problem=problem)
        self._start()

    def _listen(self) -> None:
        with suppress(EOFError):
            while self._said.poll():
                self._problem = self._said.recv()
                self._ready = self._ready or self._problem is None


def _work_under(settings: RouterSettings, supervisor: int, says: Connection) -> None:
    """Work until the supervisor is gone; who started that one is the supervisor's to watch."""
    os.environ[END_WITH_PARENT] = str(supervisor)
    try:
        _work(settings, on_ready=lambda: says.send(None))
    except (LoraplexError, OSError) as error:
        says.send(error)
        sys.exit(1)
