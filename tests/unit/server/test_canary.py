"""Canaries over a real socket: warm first, shared out by key, and every answer is of the version that it names."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import generation_pb2 as gpb
from engine.client import AsyncClient
from engine.client.testing import FakeServer, fake_server
from engine.errors import InvalidAdapter
from engine.registry.canary import Canary
from tests.unit.server.conftest import Stubs, all_of, ask, engine_of, first_of, refused, stubs_to, until

Code = grpc.StatusCode


async def publish(server: FakeServer, name: str, count: int) -> None:
    """Publish some versions."""
    for _ in range(count):
        await asyncio.to_thread(server.publish, name)


def canary(name: str, version: str, weight: float | None, **fields: str) -> pb.SetCanaryRequest:
    """A request to start a canary."""
    return pb.SetCanaryRequest(name=name, version=version, weight=weight, **fields)


async def answering(stubs: Stubs, adapter: str, key: str = "") -> str:
    """The version that answers, after checking that it is the one whose words came."""
    request = ask(adapter=adapter)
    request.routing_key = key
    answer = await stubs.generation.Generate(request)
    name = adapter.partition("@")[0]
    assert answer.completions[0].text == f"{name}@{answer.adapter.version} heard: hi"
    return str(answer.adapter.version)


async def test_a_canary_starts_grows_and_ends(stubs: Stubs, server: FakeServer, name: str) -> None:
    """It is warmed before it gets its share; keys get the side that they hash to; its end brings everybody back."""
    await publish(server, name, 2)
    *progress, last = await all_of(stubs.adapters.SetCanary(canary(name, "v2", 0.3, actor="me", reason="try")))
    assert [message.progress.stage for message in progress] == ["loading", "loading", "probing", "switching"]
    assert (last.change.alias, last.change.version, last.change.canary_weight) == ("canary", "v2", 0.3)
    assert (last.change.actor, last.change.reason) == ("me", "try")

    keys = [f"k{number}" for number in range(40)]
    for weight in (0.3, 0.8):
        await all_of(stubs.adapters.SetCanary(canary(name, "", weight)))
        expected = ["v2" if Canary(name, "v2", weight).takes(key) else "v1" for key in keys]
        assert [await answering(stubs, name, key) for key in keys] == expected
        assert {await answering(stubs, f"{name}@current", key) for key in keys} == {"v1"}
    found = await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
    assert found.adapter.canary == pb.Canary(version="v2", weight=0.8)

    ended = await stubs.adapters.EndCanary(pb.EndCanaryRequest(name=name, actor="me"))
    assert (ended.change.version, ended.change.HasField("canary_weight")) == ("v2", False)
    assert {await answering(stubs, name, key) for key in keys} == {"v1"}
    assert await answering(stubs, f"{name}@canary") == "v2"


async def test_streams_and_the_key(stubs: Stubs, server: FakeServer, name: str) -> None:
    """GenerateStream shares out by the same key as Generate."""
    await publish(server, name, 2)
    await all_of(stubs.adapters.SetCanary(canary(name, "v2", 0.5)))
    for number in range(20):
        request = ask(adapter=name)
        request.routing_key = f"k{number}"
        first, *_ = await all_of(stubs.generation.GenerateStream(gpb.GenerateStreamRequest(request=request)))
        assert first.adapter.version == await answering(stubs, name, f"k{number}")


@pytest.mark.parametrize(
    ("version", "weight", "code", "reason"),
    [
        ("v2", 1.5, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("v2", -0.1, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("v2", float("nan"), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("v2", None, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("canary", 0.5, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("v9", 0.5, Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        ("", 0.5, Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        ("v1", 0.5, Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW"),
    ],
)
async def test_refusals(
    stubs: Stubs, server: FakeServer, name: str, version: str, weight: float | None, code: Code, reason: str
) -> None:
    """A bad share or version, an alias without a version, the current version: typed, and nothing is written."""
    await publish(server, name, 2)
    refusal = await refused(all_of(stubs.adapters.SetCanary(canary(name, version, weight))))
    assert (refusal.code, refusal.reason) == (code, reason)
    refusal = await refused(stubs.adapters.EndCanary(pb.EndCanaryRequest(name=name)))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW")
    assert len((await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))).history) == 1


async def test_a_key_that_is_too_long(stubs: Stubs) -> None:
    """Routing keys are bounded."""
    request = ask()
    request.routing_key = "k" * 257
    refusal = await refused(stubs.generation.Generate(request))
    assert (refusal.code, list(refusal.violations)) == (Code.INVALID_ARGUMENT, ["routing_key"])


async def test_a_canary_that_does_not_load(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A version that the engine refuses gets no request."""
    await publish(server, name, 2)
    engine = engine_of(server)

    async def refuse(adapter: Any, *_: Any) -> None:
        raise InvalidAdapter("load", adapter.name.partition("#")[0], "vLLM refuses to load it", fix="See the log.")

    engine.load_adapter = refuse  # type: ignore[method-assign]
    try:
        refusal = await refused(all_of(stubs.adapters.SetCanary(canary(name, "v2", 1.0))))
    finally:
        del engine.load_adapter  # type: ignore[method-assign]
    assert refusal.code is Code.INVALID_ARGUMENT
    assert await answering(stubs, name) == "v1"


async def test_watchers_hear_of_canaries(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Start and end come as alias changes, the start with its weight."""
    await publish(server, name, 2)
    watch = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(name=name))
    await first_of(watch)
    await all_of(stubs.adapters.SetCanary(canary(name, "v2", 0.25)))
    await stubs.adapters.EndCanary(pb.EndCanaryRequest(name=name))
    started, ended = [(await asyncio.wait_for(first_of(watch), 5)).alias_changed for _ in range(2)]
    watch.cancel()
    assert (started.version, started.canary_weight) == ("v2", 0.25)
    assert (ended.version, ended.HasField("canary_weight")) == ("v2", False)


async def test_metrics_tell_the_sides_apart() -> None:
    """Both sides are counted with their status, a canary's failure on its own side; requests that are not split are not."""
    with fake_server() as server:
        await publish(server, "support", 2)
        engine = engine_of(server)
        async with stubs_to(server.target) as stubs:
            await answering(stubs, "support")
            await all_of(stubs.adapters.SetCanary(canary("support", "v2", 0.5)))
            keys = {side: next(key for key in map(str, range(99)) if Canary("support", "v2", 0.5).takes(key) == side)
                    for side in (True, False)}  # fmt: skip
            await answering(stubs, "support@v2")
            await answering(stubs, "support", keys[True])
            await answering(stubs, "support", keys[False])
            await stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="support@v2"))

            async def refuse(adapter: Any, *_: Any) -> None:
                raise InvalidAdapter("load", "support@v2", "vLLM refuses to load it", fix="See the log.")

            engine.load_adapter = refuse  # type: ignore[method-assign]
            request = ask(adapter="support")
            request.routing_key = keys[True]
            failure = await refused(stubs.generation.Generate(request))
        text = server.app.metrics.text().decode()
    prefix = 'loraplex_canary_requests_total{adapter="support",'
    counted = {line for line in text.splitlines() if line.startswith(prefix)}
    assert counted == {
        prefix + f'code="{code}",side="{side}"}} 1.0'
        for code, side in (("OK", "canary"), ("OK", "current"), (failure.code.name, "canary"))
    }
    assert 'loraplex_canary_ttft_seconds_count{adapter="support",side="canary"} 1.0' in text


@pytest.mark.slow
async def test_a_hundred_changes_under_traffic() -> None:
    """While canaries start, grow, are promoted, rolled back and ended, no request fails and each answer is what it names."""
    with fake_server(max_running=4) as server:
        await publish(server, "support", 3)
        engine_of(server).token_interval_s = 0.0003
        stop = asyncio.Event()
        versions: list[str] = []

        async def client(number: int) -> None:
            async with AsyncClient(server.target, retries=0) as one:
                while not stop.is_set():
                    answer = await one.generate(adapter="support", prompt="hi", temperature=0, routing_key=f"k{number}")
                    assert answer.text == f"{answer.adapter} heard: hi"
                    versions.append(answer.adapter.version)

        tasks = [asyncio.create_task(client(number)) for number in range(4)]
        async with AsyncClient(server.target, timeout_s=20) as admin:
            await until(lambda: len(versions) > 4)
            for _ in range(20):
                await admin.adapters.set_canary("support", 0.2, "v2")
                await admin.adapters.set_canary("support", 0.9)
                await admin.adapters.promote("support", "v2")
                await admin.adapters.rollback("support")
                await admin.adapters.set_canary("support", 0.5, "v3")
                await admin.adapters.end_canary("support")
            stop.set()
            await asyncio.gather(*tasks)
            assert len((await admin.adapters.get("support")).history) == 121
        assert {"v1", "v2"} <= set(versions) <= {"v1", "v2", "v3"}
