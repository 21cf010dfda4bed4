"""Routers that share a port, or take each other's place there under load: no call is refused or lost."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import grpc
import pytest

from engine.client import AsyncClient, RequestError
from engine.client.testing import write_base
from engine.cluster.ray.children import RouterChild
from engine.cluster.router import ports, workers
from engine.config import RouterSettings, load
from engine.errors import AddressInUse, BadConfiguration
from loadtest.ports import free_port
from tests.unit.cluster.load import Load
from tests.unit.cluster.process import Process


def router(folder: Path, **given: Any) -> RouterChild:
    """A router that is ready, at a port that it shares."""
    shared = {"share_port": True, "log_level": "error", "poll_s": 0.1, "drain_s": 20}
    folder.mkdir()
    child = RouterChild(load(RouterSettings, **shared, **given).model_dump(mode="json"), folder)
    child.wait_ready(30)
    return child


async def _connecting(target: str, counts: Counter[str], going: asyncio.Event) -> None:
    """Calls, each by a connection of its own that has no second try."""
    while not going.is_set():
        async with AsyncClient(target, timeout_s=20, retries=0) as client:
            try:
                await client.generate(prompt="hello", max_tokens=1)
                counts["connected"] += 1
            except RequestError as error:  # it crossed with the goodbye; with a second try it would not have noticed
                counts["crossed" if error.code is grpc.StatusCode.CANCELLED else repr(error)] += 1
            except Exception as error:  # noqa: BLE001 - every failure counts
                counts[repr(error)] += 1


async def _http(url: str, counts: Counter[str], going: asyncio.Event) -> None:
    """Completions over HTTP, whose connections are kept."""
    asked: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 1}
    async with aiohttp.ClientSession() as session:
        while not going.is_set():
            try:
                async with session.post(f"{url}/v1/completions", json=asked) as answer:
                    counts[f"http {answer.status}"] += 1
            except aiohttp.ClientError as error:
                counts[repr(error)] += 1
            await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_router_takes_anothers_place(tmp_path: Path) -> None:
    """Callers with lasting connections, callers who connect for each call, and HTTP: all are answered."""
    write_base(tmp_path / "base")
    server, port, http_port = free_port(), free_port(), free_port()
    settings = {
        "model": str(tmp_path / "base"), "registry": str(tmp_path / "registry"), "cache": str(tmp_path / "cache"),
        "port": server, "http_port": 0, "token_interval_s": 0.002,
    }  # fmt: skip
    given = {"replicas": f"127.0.0.1:{server}", "port": port, "http_port": http_port}
    target = f"127.0.0.1:{port}"
    counts: Counter[str] = Counter()
    done = asyncio.Event()
    process = Process("tests.unit.cluster.slow_server", json.dumps(settings))
    current = await asyncio.to_thread(router, tmp_path / "0", **given)
    try:
        async with AsyncClient(target, timeout_s=30) as client:
            await client.wait_ready(timeout_s=30)
            callers = Load(client)
            others = [asyncio.create_task(_connecting(target, counts, done)) for _ in range(2)]
            others.append(asyncio.create_task(_http(f"http://127.0.0.1:{http_port}", counts, done)))
            async with callers.running(4, names=("",)):
                for number in (1, 2, 3):
                    last, current = current, await asyncio.to_thread(router, tmp_path / str(number), **given)
                    await asyncio.to_thread(last.stop, 30)
                    assert last.process.returncode == 0
            done.set()
            await asyncio.gather(*others)
    finally:
        current.stop(0)
        process.kill()
    assert not callers.wrong
    assert set(counts) <= {"connected", "crossed", "http 200"}
    assert counts["crossed"] <= 2 * 3  # no more than were on their way at the three goodbyes
    assert callers.answered > 100
    assert counts["connected"] > 20


async def test_another_fleets_port_is_not_shared() -> None:
    """Routers of one fleet share a port; another fleet's router is told that it is in use."""
    port = free_port()
    with ports.claim(port, "one"), ports.claim(port, "one"), pytest.raises(AddressInUse):
        ports.claim(port, "two")
    ports.claim(port, "two").close()


@pytest.mark.timeout(60)
def test_routers_that_cannot_start_say_why_and_end() -> None:
    """Several do as one does: they are not started again and again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        where = ("--replicas", "127.0.0.1:1", "--port", port, "--http-port", "0")
        command = (sys.executable, "-m", "engine.cli", "router", "--workers", "2", *where)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    said = ended.stderr.splitlines()
    assert said[-2:] == [f"error: cannot listen on 127.0.0.1:{port} (gRPC)", f"fix: {AddressInUse.fix}"]


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> list[list[Exception | None]]:
    """What each router process says in its life, which is over at once; the one after them stays."""
    said: list[list[Exception | None]] = []

    def process(*, target: object, args: tuple[Any, ...]) -> Any:
        def start() -> None:
            for each in words or ():
                args[-1].send(each)

        words = said.pop(0) if said else None
        return SimpleNamespace(start=start, is_alive=lambda: words is None, exitcode=1)

    spawn = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: spawn)
    return said


@pytest.mark.parametrize("problem", [AddressInUse("127.0.0.1:1"), BadConfiguration("no such file", fix="Write it.")])
def test_what_kept_a_router_from_starting_is_told(lives: Any, problem: Any) -> None:
    """As it was in the process that it kept."""
    lives.append([problem])
    with pytest.raises(type(problem)) as told:
        workers._Worker(RouterSettings()).look()
    assert (told.value.message, told.value.fix) == (problem.message, problem.fix)


def test_a_router_that_died_before_it_was_ready_is_not_started_again(lives: Any) -> None:
    """Killed, or by a bug that it has told itself."""
    lives.append([])
    with pytest.raises(SystemExit, match="1"):
        workers._Worker(RouterSettings()).look()


def test_a_router_that_was_ready_is_started_again(lives: Any) -> None:
    """And once more, if its successor cannot start: the others go on meanwhile."""
    lives += [[None], [AddressInUse("127.0.0.1:1")], []]
    worker = workers._Worker(RouterSettings())
    for _ in range(3):
        assert not worker.process.is_alive()
        worker.look()
    assert worker.process.is_alive()
