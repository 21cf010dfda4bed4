"""What one failure means for the next request, and for the same one: who is asked again, who is blamed, who waits."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from grpc import StatusCode, aio

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client import AsyncClient
from engine.client.testing import write_adapter
from engine.cluster.router import journey
from engine.errors import RegistryUnavailable
from engine.registry.catalog import Route
from engine.registry.names import AdapterRef
from engine.runtime.fake import FakeEngine
from tests.unit.cluster.conftest import Cluster, StartCluster
from tests.unit.cluster.test_failover import LONG, disturbed, server_dies, server_is_cut_off
from tests.unit.server.conftest import all_of, ask, ask_stream, refused, stubs_to, until


async def test_an_adapter_whose_files_are_away(start: StartCluster) -> None:
    """It is refused as the second replica refuses it, and nobody is blamed: all others are answered meanwhile."""
    async with start(4) as cluster:
        await cluster.publish("warm", 1)
        await cluster.publish("cold", 2)
        await cluster.client.adapters.preload("warm")
        fetches = 0

        def away(hold: Any) -> Any:
            def held(manifest: Any) -> Any:
                nonlocal fetches
                if manifest.name == "cold":
                    fetches += 1
                    raise RegistryUnavailable(f"fetching {manifest.ref}", "the store is away")
                return hold(manifest)

            return held

        for app in cluster.apps:
            assert app.generator
            memory = app.generator.residency._memory
            memory.hold = away(memory.hold)  # type: ignore[method-assign]
        for number in range(10):
            refusal = await refused(cluster.stubs.generation.Generate(ask("x", "cold")))
            assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "REGISTRY_UNAVAILABLE")
            for name in ("warm", ""):
                answer = await cluster.stubs.generation.Generate(ask(f"{number}", name))
                assert answer.completions[0].text.endswith(f"heard: {number}")
        assert fetches == 20
        assert len(cluster.router.fleet.usable()) == 4


async def test_a_late_cut_after_an_early_failure(start: StartCluster) -> None:
    """What failed before the first token is forgotten once tokens come: a later cut has all of `give_up_s` again."""
    async with start(2, token_interval_s=0.5, router={"give_up_s": 0.6}) as cluster:
        messages: list[Any] = []
        request = ask(LONG, max_tokens=128)
        task = asyncio.create_task(disturbed(cluster, request, server_is_cut_off, into=messages))
        await until(lambda: any(engine.running for engine in cluster.engines))
        await server_is_cut_off(cluster, cluster.busy())
        await until(lambda: len(messages) > 0)
        for engine in cluster.engines:
            engine.token_interval_s = 0.02
        await asyncio.sleep(0.7)
        assert len(cluster.router.fleet.usable()) == 2
        await server_is_cut_off(cluster, cluster.busy())
        await task
        assert "".join(message.text for message in messages) == f"base heard: {LONG}"
        assert messages[-1].failovers == 2


async def test_new_requests_wait_for_a_fleet_that_is_cut_off_for_a_moment(start: StartCluster) -> None:
    """Every connection breaks at once and many calls with it; both replicas are well, and nobody is refused."""
    async with start(2, token_interval_s=0.005) as cluster:
        prompts = [f"{number} {LONG}" for number in range(8)]
        calls = [
            asyncio.create_task(all_of(cluster.stubs.generation.GenerateStream(ask_stream(one)))) for one in prompts
        ]
        await until(lambda: sum(len(engine.running) for engine in cluster.engines) == len(calls))
        for link in cluster.router.fleet.links.values():
            link.give_up()
        began = time.monotonic()
        for _ in range(20):
            assert (await cluster.stubs.generation.Generate(ask("x"))).completions[0].text == "base heard: x"
        for prompt, messages in zip(prompts, await asyncio.gather(*calls), strict=True):
            assert "".join(message.text for message in messages) == f"base heard: {prompt}"
        assert (
            time.monotonic() - began < 20
        )  # a replica that failed too often would be left alone for longer and longer


async def test_requests_wait_for_the_successor_of_the_only_engine(start: StartCluster) -> None:
    """While the only one drains, or when it has just gone, requests wait; if nobody comes in time, they are refused."""
    async with start(1, router={"give_up_s": 1.5}) as cluster:
        admission = cluster.apps[0].admission
        admission.drain()
        await cluster.look(0)
        assert not cluster.router.fleet.usable()
        call = cluster.stubs.generation.Generate(ask("x"))
        await asyncio.sleep(0.3)
        assert not call.done()
        admission.draining = False
        assert (await call).completions[0].text == "base heard: x"
        await server_dies(cluster, 0)
        await cluster.look(0)
        assert (await refused(cluster.stubs.generation.Generate(ask("x")))).reason == "NO_REPLICA"
        began = time.monotonic()
        assert (await refused(cluster.stubs.generation.Generate(ask("x")))).reason == "NO_REPLICA"
        assert time.monotonic() - began < 1  # by now it has been away for too long


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_outlives_kills_that_are_far_apart(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """It is not what replicas die of if they had it for a while, or had said much of its answer."""
    monkeypatch.setattr(journey, "_LATE_S", 0.2)
    async with start(4, token_interval_s=0.01) as cluster:
        request = ask(LONG, max_tokens=128)
        calls = cluster.stubs.generation
        call = (
            all_of(calls.GenerateStream(pb.GenerateStreamRequest(request=request)))
            if stream
            else calls.Generate(request)
        )
        task = asyncio.ensure_future(call)
        for _ in range(2):
            await until(lambda: any(engine.running for engine in cluster.engines))
            await asyncio.sleep(0.3)
            number = cluster.busy()
            await server_dies(cluster, number)
            await until(lambda number=number: not cluster.engines[number].running)
        answer = await task
        text = "".join(message.text for message in answer) if stream else answer.completions[0].text
        assert text == f"base heard: {LONG}"
        assert (answer[-1] if stream else answer).failovers == 2


async def test_replicas_that_disagree_about_a_base(start: StartCluster) -> None:
    """Each sends the request to the other one's base: a few times, then the caller hears of it."""
    async with start(2, models=("old", "new")) as cluster:
        for number in range(2):
            write_adapter(cluster.folder / f"v{number}", number)
            async with AsyncClient(cluster.addresses[number]) as direct:
                await direct.adapters.publish(cluster.folder / f"v{number}", "support")
        asked = 0
        for app, other in zip(
            cluster.apps, ("v2", "v1"), strict=True
        ):  # each knows the version of the other one's base
            await app.catalog.refresh()
            manifest = app.catalog.resolve(AdapterRef.parse(f"support@{other}"))

            def routed(*_: Any, manifest: Any = manifest) -> Route:
                nonlocal asked
                asked += 1
                return Route(manifest)

            app.catalog.route = routed  # type: ignore[method-assign]
        refusal = await refused(cluster.stubs.generation.Generate(ask("x", "support")))
        assert (refusal.code.name, refusal.reason) == ("FAILED_PRECONDITION", "WRONG_BASE")
        assert 2 <= asked <= 4


async def test_times_are_the_callers(start: StartCluster) -> None:
    """After a failover, before the first token or later, times count from when the router had the request."""
    async with start(2, token_interval_s=0.3) as cluster:

        def quick(engines: list[FakeEngine], interval_s: float = 0.002) -> None:
            for engine in engines:
                engine.token_interval_s = interval_s

        async def fails_over(call: Any, wait_s: float) -> Any:
            quick(cluster.engines, 5.0)
            task = asyncio.ensure_future(call)
            await until(lambda: any(engine.running for engine in cluster.engines))
            await asyncio.sleep(wait_s)
            quick(cluster.engines)
            await server_is_cut_off(cluster, cluster.busy())
            return await task

        calls = cluster.stubs.generation
        unary = await fails_over(calls.Generate(ask("x")), 0.4)
        before = (await fails_over(all_of(calls.GenerateStream(ask_stream("x"))), 0.4))[-1]
        quick(cluster.engines, 0.3)
        messages = []
        async for message in calls.GenerateStream(ask_stream(LONG)):
            messages.append(message)
            if len(messages) == 1:
                quick(cluster.engines)
                await server_is_cut_off(cluster, cluster.busy())
        for answer in (unary, before, messages[-1]):
            assert answer.failovers == 1
            first, total = (one.ToMilliseconds() for one in (answer.timings.time_to_first_token, answer.timings.total))
            assert 250 <= first <= total


@pytest.mark.parametrize("early", ["full", "drains"])
async def test_an_early_refusal_is_forgotten(start: StartCluster, early: str) -> None:
    """Who refused at first may be well when the replica that took the request fails, long after: it is asked again."""
    router = {"poll_s": 60, "give_up_s": 0.3}  # the router does not notice by itself what has become of them
    async with start(2, token_interval_s=0.02, max_running=1, max_waiting=0, router=router) as cluster:
        cluster.router.fleet.links[cluster.addresses[1]].replica.sent += 50  # so the first one is asked first
        async with stubs_to(cluster.addresses[0]) as direct:
            if early == "drains":
                cluster.apps[0].admission.drain()
            else:
                other = direct.generation.Generate(ask("x", max_tokens=1000, ignore_eos=True))
                await until(lambda: bool(cluster.engines[0].running))
            call = asyncio.ensure_future(cluster.stubs.generation.Generate(ask(LONG, max_tokens=128)))
            await until(lambda: bool(cluster.engines[1].running))
            if early == "drains":
                cluster.apps[0].admission.draining = False
            else:
                other.cancel()
                await until(lambda: not cluster.engines[0].running)
            await asyncio.sleep(0.5)
            cluster.engines[0].token_interval_s = 0
            await server_is_cut_off(cluster, 1)
            assert (await call).completions[0].text == f"base heard: {LONG}"


async def test_a_request_that_is_always_cut_off_ends(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replica that had it gives it more time, but a few only: some proxy may cut every call off."""
    monkeypatch.setattr(journey, "_PAUSE_S", 0.01)
    async with start(2, router={"give_up_s": 0.8}) as cluster:
        asked = 0
        for app in cluster.apps:
            assert app.generator

            async def hangs(*_: Any) -> Any:
                nonlocal asked
                asked += 1
                await asyncio.sleep(0.2)
                for link in cluster.router.fleet.links.values():
                    link.give_up()
                await asyncio.sleep(60)

            app.generator.engine.encode = hangs  # type: ignore[method-assign]
        assert (await refused(cluster.stubs.generation.Generate(ask("x")))).reason == "NO_REPLICA"
        assert 4 < asked < 12


async def test_every_replica_that_is_asked_looks_for_what_is_new(start: StartCluster) -> None:
    """A stream of what was published elsewhere goes on at a replica that has not seen it yet, just as it began."""
    async with start(3, token_interval_s=0.005) as cluster:
        await publish_at(cluster, 2, "support")
        request = ask(LONG, "support", max_tokens=128)
        messages = await disturbed(cluster, request, server_is_cut_off, 10)
        assert "".join(message.text for message in messages) == f"support@v1 heard: {LONG}"
        assert messages[-1].failovers == 1


async def test_replicas_of_both_bases_look_for_what_is_new(start: StartCluster) -> None:
    """One of another base finds what was published, and which base it needs; the one of that base has to look, too."""
    async with start(3, models=("old", "new", "new")) as cluster:
        links = cluster.router.fleet.links
        await publish_at(cluster, 2, "younger")
        cluster.router.fleet.learn_base("younger", links[cluster.addresses[0]].replica.report.base)
        answer = await cluster.stubs.generation.Generate(ask("x", "younger"))
        assert answer.completions[0].text == "younger@v1 heard: x"


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED])
async def test_a_replica_that_cannot_look_for_what_is_new(start: StartCluster, code: StatusCode) -> None:
    """It is gone, or its registry slow, by the time it is to look: another one is asked; who is well is not blamed."""
    async with start(3, router={"poll_s": 60}) as cluster:
        await publish_at(cluster, 2, "support")
        fleet = cluster.router.fleet
        real, stuck = fleet.adapter, []

        async def adapter(link: Any, name: str) -> Any:
            if not stuck or link in stuck:
                stuck.append(link)
                raise aio.AioRpcError(code, aio.Metadata(), aio.Metadata())
            return await real(link, name)

        fleet.adapter = adapter  # type: ignore[method-assign]
        answer = await cluster.stubs.generation.Generate(ask("x", "support"))
        assert answer.completions[0].text == "support@v1 heard: x"
        assert (stuck[0] in fleet.usable()) == (code is StatusCode.DEADLINE_EXCEEDED)


async def publish_at(cluster: Cluster, number: int, name: str) -> None:
    """Publish at one server, behind the router's back; it then gets no requests, so that nobody is asked who knows."""
    write_adapter(cluster.folder / name)
    async with AsyncClient(cluster.addresses[number]) as direct:
        await direct.adapters.publish(cluster.folder / name, name)
    cluster.apps[number].admission.drain()
    await cluster.look(number)
