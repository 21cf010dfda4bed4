"""Callers that begin and then do nothing: what they hold comes back, and the others are served meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.api.loraplex.v1 import adapters_pb2 as apb
from engine.api.loraplex.v1 import engine_pb2 as epb
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client.testing import fake_server
from tests.unit.identity.conftest import TENANTS, make_keys
from tests.unit.server.conftest import Stubs, all_of, ask, chunk, first_of, refused, stubs_to, until
from tests.unit.server.test_refusals import is_idle

Code = grpc.StatusCode
HEADER = apb.PublishAdapterRequest(header=apb.PublishHeader(name="rival-bot"))
FILE = chunk("adapter_config.json", b"{}")


async def begun(stubs: Stubs, *messages: apb.PublishAdapterRequest, **call: Any) -> Any:
    """An upload that sends these, and then nothing."""
    publishing = stubs.adapters.PublishAdapter(timeout=10, **call)
    for message in messages:
        await publishing.write(message)
    return publishing


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a minute elsewhere is a moment here."""
    monkeypatch.setattr("engine.server.stalls.STALLED_S", 0.5)


@pytest.mark.usefixtures("impatient")
async def test_readers_that_take_nothing() -> None:
    """Streams whose readers stopped give their places and slots back, all of them; whoever waited for one gets it."""
    with fake_server(context_length=1_000_000, max_message_mib=16, max_running=2, max_resident=2) as server:
        server.publish("support")
        async with stubs_to(server.target) as stubs, stubs_to(server.target) as others:
            request = ask("x" * 1000, "support", max_tokens=900_000, ignore_eos=True, logprobs=20)
            stuck = [stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)) for _ in range(2)]
            for stream in stuck:
                await first_of(stream)
            answer = await others.generation.Generate(ask(), timeout=60)  # both places were taken
            assert answer.completions[0].text == "base heard: hi"
            await until(lambda: is_idle(server))
            calls = server.app.metrics.text().decode()
            assert 'loraplex_calls_total{code="CANCELLED",method="GenerateStream"} 2.0' in calls


@pytest.mark.usefixtures("impatient")
async def test_a_reader_that_is_slow() -> None:
    """Whoever takes a little now and then gets everything."""
    with fake_server(context_length=100_000, max_message_mib=16) as server:
        async with stubs_to(server.target) as stubs:
            request = ask("x" * 100, max_tokens=300, ignore_eos=True, logprobs=20)
            tokens = 0
            async for message in stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)):
                tokens += len(message.token_ids)
                await asyncio.sleep(0.005)
            assert tokens == 300


@pytest.mark.usefixtures("impatient")
async def test_an_upload_that_goes_silent() -> None:
    """It is ended with a reason, and its place is free."""
    with fake_server(max_publishing=1) as server:
        async with stubs_to(server.target) as stubs:
            for messages in ((), (HEADER,), (HEADER, FILE)):
                refusal = await refused(all_of(await begun(stubs, *messages)))
                assert (refusal.code, refusal.reason) == (Code.ABORTED, "STALLED")
        assert server.publish("support") == "v1"


async def test_health_watchers_lock_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of gRPC's own, which need no credentials, are bounded by themselves; health is told to whoever asks once."""
    monkeypatch.setattr("engine.server.boundary._MOST_OTHER_STREAMS", 3)
    with fake_server(max_streams=3) as server:
        async with stubs_to(server.target) as stubs:
            health = health_pb2_grpc.HealthStub(stubs.channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
            for watch in watches:
                await first_of(watch)
            refusal = await refused(first_of(health.Watch(health_pb2.HealthCheckRequest())))
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "OVERLOADED")
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            assert await stubs.engine.GetEngine(epb.GetEngineRequest())
            for watch in watches:
                watch.cancel()


async def test_a_tenant_leaves_room_for_others(tmp_path: Path) -> None:
    """One tenant has at most half of the calls, and not the last upload."""
    keys = make_keys(TENANTS)
    with fake_server(max_streams=4, max_publishing=2, policy=keys.write(tmp_path / "policy.yaml")) as server:
        async with stubs_to(server.target) as stubs:
            rival, ops = keys.header("rival"), keys.header("ops")
            watches = [stubs.adapters.WatchAdapters(apb.WatchAdaptersRequest(), metadata=rival) for _ in range(2)]
            for watch in watches:
                await first_of(watch)
            refusal = await refused(stubs.generation.CountTokens(pb.CountTokensRequest(text="x"), metadata=rival))
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert (await stubs.generation.CountTokens(pb.CountTokensRequest(text="x"), metadata=ops)).prompt_tokens
            for watch in watches:
                watch.cancel()
            await until(lambda: not server.app.boundary._open.total())

            await first_of(await begun(stubs, HEADER, FILE, metadata=rival))
            refusal = await refused(first_of(await begun(stubs, HEADER, metadata=rival)))
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            await first_of(await begun(stubs, HEADER, FILE, metadata=ops))
