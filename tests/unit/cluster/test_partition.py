"""A network that loses every packet: nothing is refused and nothing is closed, the other end just says no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from engine.api.loraplex.v1 import adapters_pb2
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.cluster.fleet import FileSource, watcher
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from tests.unit.cluster.conftest import Cluster, StartCluster
from tests.unit.server.conftest import all_of, ask, stubs_to, until

PROMPT = "a rather long prompt, so that the answer is long enough to be cut"


class Relay:
    """A stretch of network to one server. While it is dark, bytes of either way vanish in it as packets would."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.partition(":")
        self._port = int(port)
        self.passable = asyncio.Event()
        self.passable.set()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Relay]:
        """Take connections for the time of the block."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)  # in which asyncio closes the sockets

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self.passable.wait()  # what was lost is sent again by TCP when the way is free
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()


@dataclass
class Cut:
    """A cluster, and another router before it, which reaches the first server through a relay."""

    cluster: Cluster
    relay: Relay
    other: RouterApp
    listed: Path

    @property
    def far(self) -> str:
        """The relay's address."""
        return f"127.0.0.1:{self.relay.port}"

    def list(self, *addresses: str) -> None:
        """Say who the servers are."""
        self.listed.write_text(yaml.safe_dump({"replicas": [*addresses]}))


@pytest.fixture
async def cut(start: StartCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cut]:
    """Two servers, of which the other router may lose one."""
    monkeypatch.setattr(watcher, "_TIMEOUT_S", 1)  # less, and a busy machine looks like a dark network
    async with start(2, token_interval_s=0.01) as cluster, Relay(cluster.addresses[0]).listening() as relay:
        listed = tmp_path / "replicas.yaml"
        settings = RouterSettings(
            replicas="followed:1", port=0, http_port=0, drain_s=0, poll_s=0.05, give_up_s=5, coalesce=False
        )
        listed.write_text(yaml.safe_dump({"replicas": [f"127.0.0.1:{relay.port}", cluster.addresses[1]]}))
        other = RouterApp(settings, FileSource(listed))
        await other.start()
        try:
            await until(lambda: len(other.fleet.usable()) == 2)
            yield Cut(cluster, relay, other, listed)
        finally:
            await other.stop()


async def test_one_router_is_cut_off_from_one_replica(cut: Cut) -> None:
    """Its streams go on elsewhere, other routers notice nothing, and when the way is free the replica is used again."""
    cluster, other = cut.cluster, cut.other
    asked = [pb.GenerateStreamRequest(request=ask(f"{number} {PROMPT}", max_tokens=100)) for number in range(6)]
    whole = await asyncio.gather(*(all_of(cluster.stubs.generation.GenerateStream(one)) for one in asked))
    async with stubs_to(f"127.0.0.1:{other.port}") as stubs:
        answers = [asyncio.create_task(all_of(stubs.generation.GenerateStream(request))) for request in asked]
        await until(lambda: all(engine.running for engine in cluster.engines))
        await asyncio.sleep(0.1)
        cut.relay.passable.clear()
        moved = 0
        for answer, undisturbed in zip(await asyncio.wait_for(asyncio.gather(*answers), 30), whole, strict=True):
            assert [m.text for m in answer] == [m.text for m in undisturbed]
            assert [m.sequence for m in answer] == list(range(len(undisturbed)))
            moved += answer[-1].failovers
        assert moved > 0
        assert [link.problem for link in other.fleet.usable()] == [""]
        assert len(cluster.router.fleet.usable()) == 2
        cut.relay.passable.set()
        await until(lambda: len(other.fleet.usable()) == 2)
        again = await asyncio.gather(*(all_of(stubs.generation.GenerateStream(one)) for one in asked))
        assert [answer[-1].failovers for answer in again] == [0] * len(again)


class Call:
    """Something under way."""

    ended = False

    def cancel(self) -> None:
        self.ended = True


async def test_what_runs_on_a_replica_that_is_listed_no_more_is_watched(cut: Cut) -> None:
    """It goes on while the replica answers, and is given up when that falls silent."""
    link, call = cut.other.fleet.links[cut.far], Call()
    link.calls.add(call)
    cut.list(cut.cluster.addresses[1])
    await until(lambda: cut.far not in cut.other.fleet.links)
    await asyncio.sleep(0.3)
    assert not call.ended
    cut.relay.passable.clear()
    await until(lambda: call.ended, 60)


async def test_what_one_replica_does_not_answer_another_one_does(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions about adapters, too, are given up where nothing is heard from."""
    fleet = cut.other.fleet
    link, usable = fleet.links[cut.far], fleet.usable
    monkeypatch.setattr(fleet, "usable", lambda: sorted(usable(), key=lambda one: one is not link))
    async with stubs_to(f"127.0.0.1:{cut.other.port}") as stubs:
        cut.relay.passable.clear()
        answer = await asyncio.wait_for(stubs.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()), 60)
        assert list(answer.adapters) == []
        assert not link.there
