"""The fleet as one router sees it: it asks every replica how it is, several times a second, and believes what it sees itself.

Nothing else is shared among routers. If the source of addresses is gone, the last ones stay; a replica that one router cannot
reach, though others can, gets no requests from that router alone.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import structlog
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio

from engine.api.loraplex.v1 import adapters_pb2, engine_pb2
from engine.cluster.fleet.access import NO_ACCESS, Access
from engine.cluster.fleet.link import Link
from engine.cluster.fleet.replies import words
from engine.cluster.fleet.sources import Source
from engine.cluster.routing import Chooser, Replicas, Report

log = structlog.get_logger(__name__)

GET_ENGINE = "/loraplex.v1.EngineService/GetEngine"
_ASK = engine_pb2.GetEngineRequest().SerializeToString()
_TIMEOUT_S = 2.0
_GIVE_UP = 3  # looks without an answer, after which nothing more is expected of the calls under way there
_MEMORY = 0.02  # weight of the latest request in the mean
_MOST_BASES = 10_000
_FINISH_S = 3600.0  # for what runs on a replica that was taken off the list


class Fleet:
    """Links to all replicas, and what the routing knows of them."""

    def __init__(self, source: Source, poll_s: float = 0.25, name: str = "", access: Access = NO_ACCESS) -> None:
        self._source = source
        self.access = access
        self._name = name
        self._poll_s = poll_s
        self.links: dict[str, Link] = {}
        self.engines: dict[str, engine_pb2.GetEngineResponse] = {}  # the latest answers, by address
        self.replicas = Replicas()
        self.chooser = Chooser(self.replicas)
        self._listed = asyncio.Event()  # the source has spoken, or ended
        self.on_change: Callable[[], None] = lambda: None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._source_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._bases: dict[str, str] = {}
        self._had: dict[str, float] = {}  # when a replica of each base took requests last, by time.monotonic
        self._versions: set[str] = set()  # of the software, ever seen
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to watch; return when every replica that the source names was asked once. Raises what the source raises."""
        self._source_task = asyncio.create_task(self._follow())
        await self._listed.wait()
        if self._source_task.done():
            self._source_task.result()
        await asyncio.gather(*(self.look(link) for link in list(self.links.values())))

    async def stop(self) -> None:
        """Close all connections."""
        tasks = [*self._tasks.values(), *self._leaving, *([self._source_task] if self._source_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self.links.values()))

    def usable(self) -> list[Link]:
        """The replicas that take requests."""
        return [link for link in self.links.values() if link.replica.usable]

    def members(self) -> list[Link]:
        """The replicas that have said how they are, whether or not they get requests now; not those that are about to end."""
        known = [link for link in self.links.values() if link.replica.report.base]
        return [link for link in known if not link.replica.report.draining]

    async def change(self, timeout_s: float) -> None:
        """Wait until a replica comes, goes, recovers or fails, for so long at most."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    @contextmanager
    def sending(self, link: Link, call: aio.Call) -> Iterator[None]:
        """Count a call as under way there for the time of the block, as Link.under_way does, and for the routing."""
        self.replicas.begin(link.replica)
        try:
            with link.under_way(call):
                yield
        finally:
            self.replicas.end(link.replica)

    def generated(self, link: Link, seconds: float) -> None:
        """A replica has answered: how long requests hold their places is what a queue's length has to be multiplied by."""
        link.succeeded()
        costs = self.chooser.costs
        self.chooser.costs = replace(costs, hold_s=costs.hold_s + _MEMORY * (seconds - costs.hold_s))

    def had_lately(self, base: str, within_s: float) -> bool:
        """Whether a replica of the base ("": of any) took requests so lately that it, or its successor, may soon again."""
        seen = [at for other, at in self._had.items() if base in ("", other)]
        return bool(seen) and time.monotonic() - max(seen) < within_s

    def base_of(self, adapter: str) -> str:
        """The base that an adapter, by the whole name that requests use, was last known to need; empty if nobody said so."""
        return self._bases.get(adapter, "")

    def learn_base(self, adapter: str, base: str) -> None:
        """A replica refused an adapter because it needs this base; "": what was known holds no longer."""
        if len(self._bases) >= _MOST_BASES:
            self._bases.clear()
        self._bases[adapter] = base

    async def refresh(self, link: Link, adapter: str) -> bool:
        """Have a replica look into the registry for what is new about an adapter; whether it knows one of this name.

        Raises AioRpcError if it does not say.
        """
        try:
            await self.adapter(link, adapter)
        except aio.AioRpcError as error:
            if error.code() is not StatusCode.NOT_FOUND:
                raise
            return False
        return True

    async def adapter(self, link: Link, name: str, timeout_s: float = _TIMEOUT_S) -> adapters_pb2.GetAdapterResponse:
        """What a replica knows of an adapter once it has looked into the registry, if it could. Raises AioRpcError."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        found = await link.adapter_call("GetAdapter", request, timeout=timeout_s, metadata=link.own)
        return cast("adapters_pb2.GetAdapterResponse", found)

    def failed(self, link: Link, asked_at: float = math.inf) -> None:
        """A request failed there by the replica's fault; `asked_at` as in Link.failed."""
        link.failed(asked_at)
        self._judge(link)

    async def look(self, link: Link) -> None:
        """Ask a replica how it is."""
        sent = link.replica.sent
        if engine := await self._ask(link):
            self._heard(link, engine, sent)
        self._judge(link)

    async def _ask(self, link: Link) -> engine_pb2.GetEngineResponse | None:
        """What a replica says; its calls are given up if that is nothing for the third time, or that its engine restarts."""
        try:
            data = await link.unary(GET_ENGINE)(_ASK, timeout=_TIMEOUT_S, metadata=link.own)
            engine = engine_pb2.GetEngineResponse.FromString(data)
        except aio.AioRpcError as error:
            self._unheard(link, words(error))
            return None
        except DecodeError:
            self._unheard(link, "what answers there is no server of ours")
            return None
        link.silent = 0
        if engine.load.restarting:
            link.give_up()
        return engine

    def _unheard(self, link: Link, why: str) -> None:
        """A replica has not said how it is."""
        if link.reachable or not link.silent:
            log.warning("a replica does not say how it is", address=link.address, why=why)
        link.reachable, link.problem = False, "it does not answer"
        link.silent += 1
        if link.silent == _GIVE_UP:
            link.give_up()

    def _heard(self, link: Link, engine: engine_pb2.GetEngineResponse, sent: int) -> None:
        """A replica has said how it is; it knows of `sent` requests of this router."""
        stranger = engine.fleet != self._name
        link.problem = f"it belongs to the fleet {engine.fleet!r}, not {self._name!r}" if stranger else _problem(engine)
        link.reachable, link.doubted = not link.problem, False
        if stranger:
            return
        if self.links.get(link.address) is not link:
            return  # it was taken off the list meanwhile
        self.engines[link.address] = engine
        self._compare(engine.server_version)
        was = link.replica.usable
        self.replicas.reported(link.replica, to_report(engine), sent)
        if was != link.replica.usable:
            self._announce()

    def _judge(self, link: Link) -> None:
        if link.trusted != link.replica.trusted:
            self.replicas.trust(link.replica, link.trusted)
            self._announce()
        base = link.replica.report.base
        if link.replica.usable:
            self._had[base] = time.monotonic()
        if link.told != (told := (link.replica.usable, base, link.why)):
            link.told = told
            log.info("replica", address=link.address, usable=link.replica.usable, base=base, why=link.why)

    def _compare(self, version: str) -> None:
        """Tell when a software version is first seen beside others: answers may differ, and some features be missing."""
        if version in self._versions:
            return
        self._versions.add(version)
        running = sorted({engine.server_version for engine in self.engines.values()})
        if len(running) > 1:
            log.warning("replicas of this fleet run different software versions", versions=running)

    def _announce(self) -> None:
        self._changed.set()
        self.on_change()

    async def _follow(self) -> None:
        try:
            async for addresses in self._source.watch():
                await self._adopt(addresses)
                self._listed.set()
        finally:
            self._listed.set()

    async def _adopt(self, addresses: Set[str]) -> None:
        for address in addresses - self.links.keys():
            link = self.links[address] = Link(address, self.access)
            link.replica.trusted = False  # until it has answered
            self.replicas.add(link.replica)
            self._tasks[address] = asyncio.create_task(self._poll(link))
        for address in self.links.keys() - addresses:
            link = self.links.pop(address)
            self.engines.pop(address, None)
            self.replicas.remove(address)
            self._tasks.pop(address).cancel()
            log.info("replica", address=address, usable=False, why="it is not listed any more")
            self._announce()
            leaving = asyncio.create_task(self._finish(link))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _finish(self, link: Link) -> None:
        """Let what runs on a replica that is not listed any more go on there, unless that falls silent."""
        until = time.monotonic() + _FINISH_S
        try:
            while link.calls and time.monotonic() < until:
                await self._ask(link)
                await asyncio.sleep(self._poll_s)
        finally:
            link.give_up()
            await link.close()

    async def _poll(self, link: Link) -> None:
        while True:
            await self.look(link)
            await asyncio.sleep(self._poll_s * random.uniform(0.8, 1.2))  # noqa: S311 - so that routers do not ask in step


def _problem(engine: engine_pb2.GetEngineResponse) -> str:
    """What a replica says that keeps it from answering."""
    if engine.load.dead:
        return "its engine is dead for good"
    return "its engine is being started again" if engine.load.restarting else ""


def to_report(engine: engine_pb2.GetEngineResponse) -> Report:
    """What a replica says of itself, as the routing needs it."""
    residents: dict[str, frozenset[str]] = {}
    in_use: dict[str, int] = {}
    for one in engine.resident:
        residents[one.name] = residents.get(one.name, frozenset()) | {one.version}
        if one.in_use:
            in_use[one.name] = in_use.get(one.name, 0) + one.in_use
    return Report(
        base=engine.base.fingerprint,
        places=max(1, engine.limits.max_running),
        slots=max(1, engine.limits.max_resident),
        running=engine.load.running,
        waiting=engine.load.waiting,
        residents=residents,
        pinned=frozenset(f"{one.name}@{one.version}" for one in engine.resident if one.pinned),
        in_use=in_use,
        ranks={one.name: one.rank for one in engine.resident if one.rank},
        draining=engine.load.draining,
    )
