"""Processes under a Ray actor, without Ray: they live as long as whoever started them, and say when they are of no use."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, call

import grpc
import psutil
import pytest

from engine.api.loraplex.v1 import adapters_pb2_grpc, engine_pb2
from engine.client.testing import write_base
from engine.cluster.ray import children
from engine.cluster.ray.children import ChildDied, ServerChild
from loadtest.ports import free_port
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import until

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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerChild]:
    """A server that is ready, with an engine that makes its answers up; files beside which it is started are no modules."""
    (tmp_path / "queue.py").write_text("raise SystemExit('my own')")
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    child = ServerChild(
        {
            "model": tmp_path / "base", "registry": tmp_path / "registry", "cache": tmp_path / "cache", "engine": "fake",
            "host": "127.0.0.1", "port": free_port(), "http_port": 0, "drain_s": 0,
        },
        tmp_path,
    )  # fmt: skip
    try:
        child.wait_ready(30)
        yield child
    finally:
        child.process.send_signal(signal.SIGCONT)
        child.stop(5)


def silent(server: ServerChild) -> None:
    """Look at it, without an answer."""
    with pytest.raises(grpc.RpcError):
        server.look()


def test_a_server_that_does_not_answer_is_replaced(server: ServerChild, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped is of no use after a while, and no sooner; it keeps nothing."""
    monkeypatch.setattr(children, "_CALL_S", 0.2)
    server.process.send_signal(signal.SIGSTOP)
    silent(server)
    server.check()
    server.process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(children, "_CALL_S", 5)
    server.look()
    monkeypatch.setattr(children, "_SILENT_S", 0.0)
    server.check()  # it is back
    monkeypatch.setattr(children, "_CALL_S", 0.2)
    server.process.send_signal(signal.SIGSTOP)
    silent(server)
    with pytest.raises(ChildDied, match="not answered"):
        server.check()
    assert server.process.poll() == -signal.SIGKILL


def test_a_server_whose_engine_is_dead_for_good_is_replaced(
    server: ServerChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so itself; one that only starts its engine again is left in peace, even if that keeps it from answering."""
    monkeypatch.setattr(children, "_SILENT_S", 0.0)
    said = engine_pb2.GetEngineResponse(load=engine_pb2.Load(restarting=True))
    get_engine = MagicMock(side_effect=[said, grpc.RpcError, said])
    monkeypatch.setattr(server._engine, "GetEngine", get_engine)
    server.look()
    server.check()
    silent(server)
    server.check()
    said.load.dead = True
    server.look()
    with pytest.raises(ChildDied, match="dead for good"):
        server.check()


def written(log: Path, word: str) -> str:
    """What is in a log once this word is: a server writes some lines after it has answered."""
    until = time.monotonic() + 10
    while word not in (text := log.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    return text


def test_a_log_is_bounded_and_keeps_the_last_words(server: ServerChild, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is long it begins anew under the server, and one that then dies is quoted from both."""
    folder = Path(server.process.args[-1]).parent  # type: ignore[index, arg-type]
    log, older = folder / "serve.log", folder / "serve.log.1"
    server.check()
    assert not older.exists()
    size = len(written(log, "ready"))
    monkeypatch.setattr(children, "_LOG_BYTES", size - 1)
    server.check()
    assert (log.stat().st_size, older.stat().st_size) == (0, size)
    assert not server.preload("nothing@v1")
    fresh = written(log, "PreloadAdapter")
    assert "PreloadAdapter" in fresh
    assert "\0" not in fresh
    assert len(fresh) < 2000
    server.process.kill()
    server.process.wait(10)
    with pytest.raises(ChildDied) as died:
        server.check()
    assert str(died.value).endswith((older.read_text() + fresh)[-2000:])


@pytest.fixture
def actors() -> Any:
    """The module, where Ray is."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own, about pydantic
        return pytest.importorskip("engine.cluster.ray.actors")


async def test_heartbeats_go_on_after_the_fleet_was_away(actors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Ray finds no Fleet, a replica keeps trying; the new one hears of it, and Ray learns if the beating has ended."""
    ray = actors.ray
    monkeypatch.setattr(actors, "HEARTBEAT_S", 0.01)
    old, new = MagicMock(), MagicMock()
    old.heartbeat.remote = AsyncMock(side_effect=ray.exceptions.RayActorError)
    new.heartbeat.remote = AsyncMock(return_value=False)
    away = ray.exceptions.RayError("away")
    monkeypatch.setattr(actors, "fleet_of", MagicMock(side_effect=[ValueError("no such actor"), away, new]))
    kind = actors.EngineReplica
    replica = MagicMock(_fleet=old, _drained=False)
    replica._child.look.return_value = engine_pb2.GetEngineResponse()
    replica._task = asyncio.create_task(kind._beat(replica))
    await until(lambda: new.heartbeat.remote.await_count > 1)
    kind.check_health(replica)
    replica._task.cancel()
    await asyncio.gather(replica._task, return_exceptions=True)
    with pytest.raises(RuntimeError, match="heartbeats"):
        kind.check_health(replica)


async def test_a_new_replica_gets_the_pins_of_the_others() -> None:
    """Before anybody knows of it: pins first, then what will be its own."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own, about pydantic
        pytest.importorskip("ray")
        kind = pytest.importorskip("engine.cluster.ray.actors").EngineReplica
    names = ("kept", *(f"a{number}" for number in range(40)))
    resident = [engine_pb2.ResidentAdapter(name=name, version="v1", pinned=name == "kept") for name in names]
    limits = engine_pb2.Limits(max_running=8, max_resident=4)
    other = engine_pb2.GetEngineResponse(limits=limits, resident=resident)
    replica = MagicMock(_engine=engine_pb2.GetEngineResponse(limits=limits))
    replica._child.address = "new:1"
    replica._fleet.reports.remote = AsyncMock(return_value={"old:1": other.SerializeToString()})
    await kind._warm(replica)
    (pinned, *loaded) = replica._child.method_calls
    assert pinned == call.pin("kept@v1")
    assert [name for name, _, _ in loaded] == ["preload"] * 3


async def test_pins_that_change_while_a_new_replica_warms_up() -> None:
    """No router knows of it then: it follows as soon as they all do, and lets go of nothing while somebody is away."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own, about pydantic
        pytest.importorskip("ray")
        kind = pytest.importorskip("engine.cluster.ray.actors").EngineReplica
    limits = engine_pb2.Limits(max_running=8, max_resident=4)

    def said(*pinned: str) -> bytes:
        resident = [engine_pb2.ResidentAdapter(name=name, version="v1", pinned=True) for name in pinned]
        return engine_pb2.GetEngineResponse(limits=limits, resident=resident).SerializeToString()

    replica = MagicMock(_engine=engine_pb2.GetEngineResponse(limits=limits))
    replica._child.address = "new:1"
    replica._fleet.reports.remote = AsyncMock(return_value={"old:1": said("kept", "dropped")})
    before = await kind._warm(replica)
    for now, wanted in (
        ({"old:1": said("kept", "dropped"), "new:1": said("kept", "dropped")}, []),
        (
            {"old:1": said("kept", "more"), "new:1": said("dropped")},
            [call("more@v1"), call("dropped@v1", pinned=False)],
        ),
        ({"other:1": said("kept", "more")}, [call("more@v1")]),
    ):
        replica._child.pin.reset_mock()
        replica._fleet.reports.remote.return_value = now
        await kind._pin_since(replica, before)
        assert replica._child.pin.call_args_list == wanted


async def test_pins_of_a_server(start: StartCluster) -> None:
    """It says whether the adapter is there to stay."""
    async with start(1) as cluster:
        await cluster.publish("support")
        with grpc.insecure_channel(cluster.addresses[0]) as channel:
            child = MagicMock(_adapters=adapters_pb2_grpc.AdapterServiceStub(channel), _metadata=())
            assert await asyncio.to_thread(ServerChild.pin, child, "support@v1")
            assert not await asyncio.to_thread(ServerChild.pin, child, "support@v2")
            assert cluster.residents(0) == {"support@v1"}
            generator = cluster.apps[0].generator
            assert generator
            assert all(one.pinned for one in generator.residency.residents())
            assert await asyncio.to_thread(partial(ServerChild.pin, child, "support@v1", pinned=False))
            assert not any(one.pinned for one in generator.residency.residents())


async def test_a_router_follows_the_fleet_whatever_happens(actors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fleet that is away and a disk that is full end nothing, and Ray learns if the following has ended."""
    monkeypatch.setattr(actors, "_AWAY_S", 0.01)
    away = actors.ray.exceptions.RayActorError()
    full = OSError(errno.ENOSPC, "no space left")
    fleet = MagicMock()
    fleet.addresses.remote = AsyncMock(side_effect=[away, ["a:1"], ["a:1"], asyncio.CancelledError])
    monkeypatch.setattr(actors, "fleet_of", MagicMock(side_effect=[ValueError("no such actor"), *[fleet] * 4]))
    write = MagicMock(side_effect=[full, None])
    kind = actors.Router
    router = MagicMock(_known=None, _write=write)
    router._task = MagicMock(done=lambda: False)
    with pytest.raises(asyncio.CancelledError):
        await kind._follow(router)
    assert write.call_args_list == [call(["a:1"])] * 2
    kind.check_health(router)
    router._task = MagicMock(done=lambda: True)
    with pytest.raises(RuntimeError, match="follow"):
        kind.check_health(router)
