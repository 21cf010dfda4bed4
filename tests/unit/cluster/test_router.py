"""The router: the same contract as one server, requests where their adapters are."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import aiohttp
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.api.loraplex.v1 import adapters_pb2, engine_pb2
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.cluster.fleet import watcher
from engine.cluster.router.adapters import AdapterFanOut
from engine.cluster.router.overview import Overview
from engine.server import boundary, engine_info, http
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import all_of, ask, ask_stream, refused, until


@pytest.mark.parametrize(("proto", "service"), [(adapters_pb2, AdapterFanOut), (engine_pb2, Overview)])
def test_whom_each_rpc_asks_is_a_decision(proto: Any, service: type) -> None:
    """The router says of each RPC by its name who answers it: a new one gets no such answer by itself."""
    (described,) = proto.DESCRIPTOR.services_by_name.values()
    assert {name for name in vars(service) if name[0].isupper()} == {method.name for method in described.methods}


async def test_same_contract(start: StartCluster) -> None:
    """Unary, stream, counts, overview, health and errors are those of a server."""
    async with start() as cluster:
        stubs = cluster.stubs
        await cluster.publish("support")
        answer = await stubs.generation.Generate(ask("hello", "support"))
        assert answer.completions[0].text == "support@v1 heard: hello"
        messages = await all_of(stubs.generation.GenerateStream(ask_stream("hello", "support", logprobs=1)))
        assert "".join(message.text for message in messages) == "support@v1 heard: hello"
        assert [message.sequence for message in messages] == list(range(len(messages)))
        assert messages[-1].usage == answer.usage
        assert messages[-1].failovers == answer.failovers == 0
        assert (await stubs.generation.CountTokens(pb.CountTokensRequest(text="hello"))).prompt_tokens == 5
        engine = await stubs.engine.GetEngine(engine_pb2.GetEngineRequest())
        assert (engine.engine, engine.compute_dtype) == ("2 of 2 replicas: fake", "float32")
        assert engine.limits.max_running == 2 * cluster.apps[0].settings.max_running
        health = health_pb2_grpc.HealthStub(stubs.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        refusal = await refused(stubs.generation.Generate(ask("hello", "suport")))
        assert (refusal.code.name, refusal.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
        refusal = await refused(stubs.generation.Generate(ask("hello", max_tokens=0)))
        assert list(refusal.violations) == ["sampling.max_tokens"]
        call = stubs.channel.unary_unary("/loraplex.v1.GenerationService/Generate")
        assert (await refused(call(b"\xff\xff"))).code.name == "INVALID_ARGUMENT"


async def test_a_fleet_tells_every_precision_that_it_computes_in(start: StartCluster) -> None:
    """A score that any of them gave is the score of none."""
    async with start() as cluster:
        cluster.engines[1].info = replace(cluster.engines[1].info, dtype="bfloat16")
        await cluster.look(1)
        found = await cluster.stubs.engine.GetEngine(engine_pb2.GetEngineRequest())
        assert found.compute_dtype == "bfloat16, float32"


async def test_replicas_that_fail_while_they_are_asked_have_answered(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they said is told, though none of them gets requests by then."""
    async with start(2, router={"poll_s": 60}) as cluster:
        fleet = cluster.router.fleet
        overview = Overview(fleet, ask=True)
        ask_all = overview._everybody

        async def everybody(*args: Any) -> list[bytes]:
            answers = await ask_all(*args)
            for link in fleet.links.values():
                fleet.failed(link)
            return answers

        monkeypatch.setattr(overview, "_everybody", everybody)
        context = MagicMock(invocation_metadata=lambda: (), peer=lambda: "ipv4:127.0.0.1:1")
        engine = await overview.GetEngine(engine_pb2.GetEngineRequest(), context)
        assert not fleet.usable()
        assert engine.engine == "2 of 2 replicas: fake"


async def test_openai_over_the_router(start: StartCluster) -> None:
    """A fleet speaks OpenAI's API as one server does: models, answers, streams and refusals."""
    async with start() as cluster:
        await cluster.publish("support")
        url = f"http://127.0.0.1:{cluster.router.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert [model.id async for model in client.models.list()][:2] == ["base", "support"]
            ask = partial(client.completions.create, model="support", prompt="hi", temperature=0, max_tokens=50)
            assert (await ask()).choices[0].text == "support@v1 heard: hi"
            assert "".join([chunk.choices[0].text async for chunk in await ask(stream=True)]) == "support@v1 heard: hi"
            messages = [{"role": "user", "content": "x"}]
            chat = await client.chat.completions.create(model="support@v1", temperature=0, messages=messages)
            assert chat.model == "support@v1"
            with pytest.raises(openai.NotFoundError):
                await ask(model="nobody")
            await ask(model="base")
            with pytest.raises(openai.BadRequestError) as refused:
                await ask(max_tokens=10**6)
            assert refused.value.param == "max_tokens"
        activity = await cluster.stubs.engine.GetActivity(engine_pb2.GetActivityRequest())
        assert {one.name: one.requests for one in activity.adapters} == {"": 1, "support": 3}
        assert activity.ready
        assert [one.text for one in activity.events if one.kind == "published"] == ["support@v1"]


async def test_a_drain_waits_for_answers_over_http(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that stops lets them end as it does gRPC's, refuses new calls meanwhile, and says that it is not ready."""
    monkeypatch.setattr(http, "_CLOSE_S", 0.05, raising=False)
    async with start(1, token_interval_s=0.5, router={"drain_s": 60}) as cluster, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{cluster.router.http_port}"
        asked = {"model": "base", "prompt": "hi", "max_tokens": 50, "temperature": 0, "stream": True}
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            assert b"text" in await answer.content.readline()
            stopping = asyncio.create_task(cluster.router.stop())
            await until(lambda: cluster.router._draining)
            async with session.post(f"{url}/v1/completions", json=asked) as late:
                assert (late.status, (await late.json())["error"]["code"]) == (503, "draining")
            async with session.get(f"{url}/readyz") as ready:
                assert ready.status == 503
            assert not stopping.done()
            cluster.engines[0].token_interval_s = 0
            assert b"[DONE]" in await answer.content.read()
        await asyncio.wait_for(stopping, 20)


async def test_a_drain_ends_in_time_over_http(start: StartCluster) -> None:
    """What is still under way at its end is cut, over HTTP as over gRPC."""
    async with start(1, token_interval_s=0.5, router={"drain_s": 0.2}) as cluster, aiohttp.ClientSession() as session:
        asked = {"model": "base", "prompt": "hi" * 100, "max_tokens": 200, "temperature": 0, "stream": True}
        url = f"http://127.0.0.1:{cluster.router.http_port}/v1/completions"
        async with session.post(url, json=asked) as answer:
            assert b"text" in await answer.content.readline()
            await asyncio.wait_for(cluster.router.stop(), 10)
            with pytest.raises(aiohttp.ClientError):
                await answer.content.read()


async def test_request_id_and_tenant_reach_the_replica(start: StartCluster) -> None:
    """The id that the router gives or the caller brings is the replica's, and quotas are the caller's tenant's."""
    async with start(max_waiting_per_tenant=0, max_running=1, token_interval_s=0.01) as cluster:
        metadata = (("x-request-id", "mine-1"), ("x-loraplex-tenant", "gold"))
        running = asyncio.create_task(cluster.client.generate(prompt="on", max_tokens=200, ignore_eos=True))
        other = asyncio.create_task(cluster.client.generate(prompt="no", max_tokens=200, ignore_eos=True))
        await until(lambda: all(engine.running for engine in cluster.engines))
        refusal = await refused(cluster.stubs.generation.Generate(ask(), metadata=metadata))
        assert refusal.quota == {} or "gold" in refusal.quota
        assert refusal.metadata["request_id"] == "mine-1"
        running.cancel()
        other.cancel()
        await asyncio.gather(running, other, return_exceptions=True)
        answer = await cluster.stubs.generation.Generate(ask())
        assert len(answer.request_id) == 32


async def test_only_answers_tell_how_long_a_request_takes(start: StartCluster) -> None:
    """Counts of tokens, refusals and callers who leave are over sooner than answers, and would make queues look short."""
    async with start(2, token_interval_s=0.01) as cluster:
        chooser, stubs = cluster.router.fleet.chooser, cluster.stubs
        before = chooser.costs.hold_s
        await stubs.generation.CountTokens(pb.CountTokensRequest(text="hello"))
        await refused(stubs.generation.Generate(ask("hello", "nobody")))
        await refused(all_of(stubs.generation.GenerateStream(ask_stream("hello", "nobody"))))
        for method, request in ((stubs.generation.Generate, ask), (stubs.generation.GenerateStream, ask_stream)):
            call = method(request("hello"))
            await until(lambda: any(engine.running for engine in cluster.engines))
            call.cancel()
            await until(lambda: not any(engine.running for engine in cluster.engines))
        assert chooser.costs.hold_s == before
        await stubs.generation.Generate(ask("hello"))
        unary = chooser.costs.hold_s
        await all_of(stubs.generation.GenerateStream(ask_stream("hello")))
        assert chooser.costs.hold_s < unary < before


async def test_an_adapter_stays_at_one_replica(start: StartCluster) -> None:
    """Requests for an adapter go where it is; many adapters are spread."""
    async with start(3, max_resident=32) as cluster:  # room, whoever the ports' numbers favour
        names = [f"a{number}" for number in range(24)]
        for number, name in enumerate(names):
            await cluster.publish(name, number)
        for _ in range(3):
            await asyncio.gather(*(cluster.client.generate(adapter=name, prompt="x", temperature=0) for name in names))
        residents = [cluster.residents(number) for number in range(3)]
        assert sum(map(len, residents)) == len(names)
        assert all(residents)


async def test_what_metadata_cannot_hold_is_refused(start: StartCluster) -> None:
    """A request that gRPC would not send on is the caller's mistake, and no replica is blamed for it."""
    async with start(2) as cluster:
        for bad in ("größe", "a\nb"):
            request = ask("x")
            request.request_id = bad
            stream = cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request))
            for call in (all_of(stream), cluster.stubs.generation.Generate(request)):
                assert (await refused(call)).code.name == "INVALID_ARGUMENT"
        url = f"http://127.0.0.1:{cluster.router.http_port}/v1/completions"
        async with aiohttp.ClientSession() as session:
            for header in ({"authorization": "Bearer größe"}, {"tracestate": "a\tb"}):
                async with session.post(url, json={"model": "base", "prompt": "x"}, headers=header) as response:
                    assert response.status < 500
        assert len(cluster.router.fleet.usable()) == 2


async def test_draining_and_restarting_replicas_get_nothing(start: StartCluster) -> None:
    """A replica that drains is left alone, and when all do, callers are told when to come back."""
    async with start(2) as cluster:
        cluster.apps[0].admission.drain()
        await cluster.look(0)
        for _ in range(4):
            await cluster.client.generate(prompt="x", temperature=0)
        assert not cluster.apps[0].metrics.generated_tokens
        cluster.apps[1].admission.drain()
        await cluster.look(1)
        refusal = await refused(cluster.stubs.generation.Generate(ask()))
        assert (refusal.code.name, refusal.reason, refusal.retry_s) == ("UNAVAILABLE", "NO_REPLICA", 5.0)


@pytest.mark.parametrize("kind", ["drain", "full"])
async def test_a_refusal_before_the_router_knows(start: StartCluster, kind: str) -> None:
    """A replica that drains or is full since the router last looked refuses, and the other one answers."""
    waiting = 1 if kind == "drain" else 0
    async with start(2, max_running=1, max_waiting=waiting, token_interval_s=0.002, router={"poll_s": 30}) as cluster:
        if kind == "drain":
            cluster.apps[0].admission.drain()
        calls = (cluster.client.generate(prompt=f"{number}", max_tokens=60) for number in range(2))
        assert all(answer.text for answer in await asyncio.gather(*calls))


async def test_a_server_of_another_fleet_is_left_out(start: StartCluster) -> None:
    """A server that says it belongs elsewhere gets nothing, even at an address of ours."""
    async with start(1, fleet="blue", router={"name": "green"}) as cluster:
        refusal = await refused(cluster.stubs.generation.Generate(ask()))
        assert refusal.reason == "NO_REPLICA"
    async with start(1, fleet="blue", router={"name": "blue"}) as cluster:
        assert (await cluster.client.generate(prompt="x", temperature=0)).text == "base heard: x"


async def test_the_log_says_once_why_a_replica_gets_nothing(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reason once, with the base, however often the router looks."""
    log = MagicMock()
    monkeypatch.setattr(watcher, "log", log)

    def said() -> list[tuple[bool, str]]:
        calls = [call.kwargs for call in log.info.call_args_list]
        log.reset_mock()
        return [(one["usable"], one["why"]) for one in calls]

    async with start(1, fleet="blue", router={"name": "green"}) as cluster:
        await cluster.look(0)
        assert said() == [(False, "it belongs to the fleet 'blue', not 'green'")]
    async with start(1, max_restarts=0, router={"poll_s": 60}) as cluster:
        assert log.info.call_args.kwargs["base"] == cluster.router.fleet.replicas.bases()[0]
        assert said() == [(True, "")]
        for _ in range(3):
            cluster.router.fleet.failed(next(iter(cluster.router.fleet.links.values())))
        await cluster.look(0)
        assert said() == [(False, "a request failed there"), (False, "requests fail there")]
        cluster.engines[0].alive = False
        await until(lambda: not cluster.apps[0].engine.alive)
        for _ in range(2):
            await cluster.look(0)
        assert said() == [(False, "its engine is dead for good")]
        server = cluster.apps[0]._server
        assert server
        await server.stop(None)
        for _ in range(2):
            await cluster.look(0)
        assert said() == [(False, "it does not answer")]


async def test_different_software_versions_are_told_once(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an upgrade: the router warns when the first replica has another version than the others."""
    log = MagicMock()
    monkeypatch.setattr(watcher, "log", log)
    monkeypatch.setattr(engine_info, "metadata", MagicMock(version=lambda _: "1.0"))
    async with start(2, router={"poll_s": 60}) as cluster:
        log.warning.assert_not_called()
        monkeypatch.setattr(engine_info, "metadata", MagicMock(version=lambda _: "1.1"))
        for number in (0, 0, 1):
            await cluster.look(number)
        log.warning.assert_called_once()
        assert log.warning.call_args.kwargs["versions"] == ["1.0", "1.1"]


async def test_one_trace_through_both_hops(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's trace reaches the server's log, and without one the router begins one."""
    calls = MagicMock()
    monkeypatch.setattr(boundary, "log", calls)
    async with start(1) as cluster:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        metadata = (("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),)
        await cluster.stubs.generation.Generate(ask(), metadata=metadata)
        await cluster.stubs.generation.Generate(ask())
    logged = [call.kwargs for call in calls.info.call_args_list if call.kwargs.get("method") == "Generate"]
    server, router, again, _ = (entry.get("trace_id") for entry in logged)
    assert (server, router) == (trace, trace)
    assert again
    assert again != trace
    assert len({entry["request_id"] for entry in logged}) == 2
