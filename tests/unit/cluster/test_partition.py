"""A network that loses every packet: nothing is refused and nothing is closed, the other end just says no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.cluster.fleet import StaticSource, watcher
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from tests.unit.cluster.conftest import StartCluster
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


async def test_one_router_is_cut_off_from_one_replica(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams go on elsewhere, other routers notice nothing, and when the way is free the replica is used again."""
    monkeypatch.setattr(watcher, "_TIMEOUT_S", 1)  # less, and a busy machine looks like a dark network
    async with start(2, token_interval_s=0.01) as cluster, Relay(cluster.addresses[0]).listening() as relay:
        asked = [pb.GenerateStreamRequest(request=ask(f"{number} {PROMPT}", max_tokens=100)) for number in range(6)]
        whole = await asyncio.gather(*(all_of(cluster.stubs.generation.GenerateStream(one)) for one in asked))
        addresses = [f"127.0.0.1:{relay.port}", cluster.addresses[1]]
        settings = RouterSettings(
            replicas=",".join(addresses), port=0, http_port=0, drain_s=0, poll_s=0.05, give_up_s=5, coalesce=False
        )
        other = RouterApp(settings, StaticSource(addresses))
        await other.start()
        try:
            async with stubs_to(f"127.0.0.1:{other.port}") as stubs:
                await until(lambda: len(other.fleet.usable()) == 2)
                answers = [asyncio.create_task(all_of(stubs.generation.GenerateStream(request))) for request in asked]
                await until(lambda: all(engine.running for engine in cluster.engines))
                await asyncio.sleep(0.1)
                relay.passable.clear()
                moved = 0
                for answer, undisturbed in zip(
                    await asyncio.wait_for(asyncio.gather(*answers), 30), whole, strict=True
                ):
                    assert [m.text for m in answer] == [m.text for m in undisturbed]
                    assert [m.sequence for m in answer] == list(range(len(undisturbed)))
                    moved += answer[-1].failovers
                assert moved > 0
                assert [link.problem for link in other.fleet.usable()] == [""]
                assert len(cluster.router.fleet.usable()) == 2
                relay.passable.set()
                await until(lambda: len(other.fleet.usable()) == 2)
                again = await asyncio.gather(*(all_of(stubs.generation.GenerateStream(one)) for one in asked))
                assert [answer[-1].failovers for answer in again] == [0] * len(again)
        finally:
            await other.stop()
