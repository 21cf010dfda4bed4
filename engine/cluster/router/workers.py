"""Router processes: one, or several that share the gRPC port (SO_REUSEPORT: the kernel spreads connections over them)."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
from contextlib import suppress
from multiprocessing.context import SpawnProcess

import structlog
import uvloop

from engine.cluster.fleet import DnsSource, FileSource, Source, StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from engine.errors import BadConfiguration
from engine.server import logs
from engine.server.process_end import END_WITH_PARENT, told_to_end

log = structlog.get_logger(__name__)

DNS = "dns:"
NOTIFY_SOCKET = "NOTIFY_SOCKET"  # environment: a datagram socket that hears of each process that is ready
_LOOK_S = 0.2  # between looks at the workers


def run(settings: RouterSettings) -> None:
    """Run until SIGTERM or SIGINT. A worker that dies is started again."""
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


async def serve(settings: RouterSettings) -> None:
    """Run one router in this process until SIGTERM or SIGINT."""
    app = RouterApp(settings, source_of(settings))
    try:
        with told_to_end() as ending:
            await app.start()
            _tell_ready()
            await ending.wait()
    finally:
        await app.stop()


def _tell_ready() -> None:
    """Tell whoever started this process, if they asked for it, that it takes calls: as systemd has it."""
    if address := os.environ.get(NOTIFY_SOCKET):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, suppress(OSError):
            told.sendto(b"READY=1", address)


def _work(settings: RouterSettings) -> None:
    logs.configure(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))


async def _supervise(settings: RouterSettings) -> None:
    # One port of /metrics for each: the first has the one that was asked for, the others those after it.
    own = [
        settings.model_copy(update={"http_port": settings.http_port + number if settings.http_port else 0})
        for number in range(settings.workers)
    ]
    with told_to_end() as ending:
        workers = [_started(one) for one in own]
        while not ending.is_set():
            for number, worker in enumerate(workers):
                if not worker.is_alive():
                    log.error("a router process has died and is started again", exitcode=worker.exitcode)
                    workers[number] = _started(own[number])
            try:
                await asyncio.wait_for(ending.wait(), _LOOK_S)
            except TimeoutError:
                continue
    for worker in workers:
        worker.terminate()
    for worker in workers:
        await asyncio.to_thread(worker.join)


def _started(settings: RouterSettings) -> SpawnProcess:
    spawn = multiprocessing.get_context("spawn")  # gRPC dislikes forks
    worker = spawn.Process(target=_work_under, args=(settings, os.getpid()))
    worker.start()
    return worker


def _work_under(settings: RouterSettings, supervisor: int) -> None:
    """Work until the supervisor is gone; who started that one is the supervisor's to watch."""
    os.environ[END_WITH_PARENT] = str(supervisor)
    _work(settings)
