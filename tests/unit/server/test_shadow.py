"""Shadow traffic over a real socket: compared and dropped, in room that nobody needs, and nobody ever notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.client.testing import FakeServer, fake_server
from engine.errors import EngineDied, InvalidAdapter
from engine.registry.manifest import BaseRef
from engine.runtime.engine import Delta, EngineRequest
from engine.runtime.fake import FakeEngine
from tests.unit.server.conftest import Stubs, all_of, ask, engine_of, refused, stubs_to, until

Code = grpc.StatusCode


def shadow(name: str, version: str = "v2", sample: float | None = 1.0, **fields: str) -> pb.SetShadowRequest:
    """A request for a shadow."""
    return pb.SetShadowRequest(name=name, version=version, sample=sample, **fields)


@asynccontextmanager
async def shadowed(count: int = 2, **settings: Any) -> AsyncIterator[tuple[FakeServer, Stubs]]:
    """A server on which support@v2 is the shadow of every request for support."""
    with fake_server(**settings) as server:
        for _ in range(count):
            await asyncio.to_thread(server.publish, "support")
        async with stubs_to(server.target) as stubs:
            await all_of(stubs.adapters.SetShadow(shadow("support")))
            yield server, stubs


async def report(stubs: Stubs, name: str = "support") -> pb.GetShadowReportResponse:
    """The shadow's report."""
    return await stubs.adapters.GetShadowReport(pb.GetShadowReportRequest(name=name))


async def settled(server: FakeServer) -> None:
    """Wait until nothing runs on the engine, shadows included."""
    spare = server.app._spare
    await until(lambda: not engine_of(server).running and not spare._guests)


def asked_of(engine: FakeEngine, who: str, told: Any) -> None:
    """Have `told` called with each request that `who` gets, before it is answered; what it raises is the answer."""
    original = FakeEngine.generate

    async def generate(request: EngineRequest) -> AsyncIterator[Delta]:
        if request.adapter and request.adapter.ref == who:
            await told(request)
        async for delta in original(engine, request):
            yield delta

    engine.generate = generate  # type: ignore[method-assign, assignment]


async def test_answers_are_compared_and_dropped() -> None:
    """The caller gets the current version's answer; the report says that the other's differs, where, and how fast both were."""
    async with shadowed() as (server, stubs):
        for _ in range(5):
            answer = await stubs.generation.Generate(ask(adapter="support"))
            assert answer.completions[0].text == "support@v1 heard: hi"
            await settled(server)
        found = await report(stubs)
        assert (found.shadow.version, found.current_version, found.drawn, found.compared, found.equal) == (
            "v2", "v1", 5, 5, 0,
        )  # fmt: skip
        assert found.first_difference_p50 == found.first_difference_min == len("support@v")
        for times in (found.current_times, found.shadow_times):
            assert times.time_to_first_token.p50.ToTimedelta() <= times.total.p50.ToTimedelta()
        assert not found.failed
        assert 'loraplex_shadow_copies_total{adapter="support",outcome="different"} 5.0' in (
            server.app.metrics.text().decode()
        )
        summary = (await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name="support"))).adapter
        assert (summary.shadow, summary.aliases["shadow"]) == (pb.Shadow(version="v2", sample=1.0), "v2")


async def test_equal_answers_count_as_equal() -> None:
    """A choice of one has the same answer whoever gives it; sampled requests are compared at temperature 0."""
    async with shadowed() as (server, stubs):
        for temperature in (0.0, 0.9):
            request = ask(adapter="support", temperature=temperature, n=1 if temperature == 0 else 2)
            request.sampling.structured.choice.options.append("yes")
            await stubs.generation.Generate(request)
            await settled(server)
        found = await report(stubs)
        assert (found.compared, found.equal, found.asked_greedily) == (2, 2, 1)
        assert not found.HasField("first_difference_p50")


async def test_only_what_current_answers_for_the_bare_name_is_copied() -> None:
    """Explicit versions, another adapter, a canary's side and the base are not; nor is an answer that was cut short."""
    async with shadowed(3) as (server, stubs):
        await asyncio.to_thread(server.publish, "legal")
        await all_of(stubs.adapters.SetCanary(pb.SetCanaryRequest(name="support", version="v3", weight=1.0)))
        for adapter in ("support", "support@v1", "support@current", "support@shadow", "legal", ""):
            await stubs.generation.Generate(ask(adapter=adapter))
        await stubs.adapters.EndCanary(pb.EndCanaryRequest(name="support"))
        engine_of(server).token_interval_s = 0.01
        call = stubs.generation.Generate(ask(adapter="support", max_tokens=500, ignore_eos=True))
        await until(lambda: engine_of(server).running)
        call.cancel()
        await settled(server)
        assert (await report(stubs)).drawn == 0


async def test_a_share_is_drawn() -> None:
    """About the share that was asked for; none once it has ended, or once current has moved."""
    async with shadowed() as (server, stubs):
        await all_of(stubs.adapters.SetShadow(shadow("support", "", 0.3, actor="me", reason="less")))
        for _ in range(100):
            await stubs.generation.Generate(ask(adapter="support"))
        assert 10 <= (await report(stubs)).drawn <= 55
        ended = await stubs.adapters.EndShadow(pb.EndShadowRequest(name="support", actor="me"))
        assert (ended.change.alias, ended.change.version, ended.change.HasField("shadow_sample")) == (
            "shadow", "v2", False,
        )  # fmt: skip
        refusal = await refused(report(stubs))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW")
        assert (await refused(stubs.adapters.EndShadow(pb.EndShadowRequest(name="support")))).code is refusal.code
        await all_of(stubs.adapters.SetShadow(shadow("support")))
        await all_of(stubs.adapters.SetAlias(pb.SetAliasRequest(name="support", alias="current", version="v2")))
        assert (await refused(report(stubs))).reason == "NOT_ALLOWED_NOW"
        await settled(server)


async def test_it_gives_way_to_whoever_comes() -> None:
    """Copies that run are taken back at once when the engine fills up, and none enters while anybody waits."""
    async with shadowed(max_running=4) as (server, stubs):
        engine, never = engine_of(server), asyncio.Event()

        async def hang(_: EngineRequest) -> None:
            while not never.is_set():
                await asyncio.sleep(0.005)

        asked_of(engine, "support@v2", hang)
        await stubs.generation.Generate(ask(adapter="support"))
        spare = server.app._spare
        await until(lambda: spare._guests)
        engine.token_interval_s = 0.002
        started = time.monotonic()
        await asyncio.gather(*(stubs.generation.Generate(ask(adapter="support")) for _ in range(8)))
        assert time.monotonic() - started < 5
        never.set()
        await settled(server)
        found = await report(stubs)
        assert found.drawn == 9
        assert found.dropped["busy"] >= 5
        assert found.compared + sum(found.dropped.values()) + sum(found.failed.values()) == 9


async def test_few_are_in_flight_at_once() -> None:
    """Not more than max_shadows, however many are drawn; 0 makes none."""
    async with shadowed(max_shadows=2) as (server, stubs):
        may_go = asyncio.Event()

        async def hang(_: EngineRequest) -> None:
            while not may_go.is_set():
                await asyncio.sleep(0.005)

        asked_of(engine_of(server), "support@v2", hang)
        for _ in range(5):
            await stubs.generation.Generate(ask(adapter="support"))
        assert (await report(stubs)).dropped["in flight"] == 3
        may_go.set()
        await settled(server)
        assert (await report(stubs)).compared == 2


async def test_it_holds_no_slot_that_somebody_needs() -> None:
    """With two slots and a shadow in one, two other adapters run at once: the copy ends, its version makes room."""
    async with shadowed(max_resident=2) as (server, stubs):
        await asyncio.to_thread(server.publish, "legal")
        never = asyncio.Event()

        async def hang(_: EngineRequest) -> None:
            while not never.is_set():
                await asyncio.sleep(0.005)

        asked_of(engine_of(server), "support@v2", hang)
        await stubs.generation.Generate(ask(adapter="support"))
        await until(lambda: server.app._spare._guests)
        engine_of(server).token_interval_s = 0.002
        answers = await asyncio.wait_for(
            asyncio.gather(*(stubs.generation.Generate(ask(adapter=name)) for name in ("support", "legal"))), 5
        )
        assert [answer.adapter.name for answer in answers] == ["support", "legal"]
        await settled(server)
        found = await report(stubs)
        assert found.dropped["busy"] + found.dropped["not loaded"] == found.drawn == 2


@pytest.mark.parametrize("how", ["nan", "dies", "raises"])
async def test_its_failure_touches_nobody(how: str) -> None:
    """NaN, a dying engine, a bug: the caller has its answer, the next ones too, and the report says what it was."""
    async with shadowed() as (server, stubs):
        engine = engine_of(server)

        async def fail(_: EngineRequest) -> None:
            raise EngineDied if how == "dies" else RuntimeError("bug")

        if how == "nan":
            engine.not_finite.add("support@v2")
        else:
            asked_of(engine, "support@v2", fail)
        for _ in range(3):
            answer = await stubs.generation.Generate(ask(adapter="support"))
            assert answer.completions[0].text == "support@v1 heard: hi"
            await settled(server)
        found = await report(stubs)
        status = {"nan": "FAILED_PRECONDITION", "dies": "UNAVAILABLE", "raises": "INTERNAL"}[how]
        assert dict(found.failed) == {status: 3}
        assert found.last_failure
        assert (found.compared, found.drawn) == (0, 3)


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (shadow("?", "v2", 1.5), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (shadow("?", "v2", float("nan")), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (shadow("?", "v2", None), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (shadow("?", "canary", 0.5), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (shadow("?", "v9", 0.5), Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        (shadow("?", "", 0.5), Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        (shadow("?", "v1", 0.5), Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW"),
    ],
)
async def test_refusals(
    stubs: Stubs, server: FakeServer, name: str, request_: pb.SetShadowRequest, code: Code, reason: str
) -> None:
    """A bad share or version, an alias without a version, an alias for a version, the current one: nothing is written."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    asked = pb.SetShadowRequest()
    asked.CopyFrom(request_)
    asked.name = name
    refusal = await refused(all_of(stubs.adapters.SetShadow(asked)))
    assert (refusal.code, refusal.reason) == (code, reason)
    assert len((await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))).history) == 1


@pytest.mark.parametrize("alias", ["shadow", "canary"])
async def test_a_version_of_another_base_is_refused(alias: str) -> None:
    """It could not be compared, nor answer; the refusal names both bases."""
    with fake_server() as server:
        for _ in range(2):
            await asyncio.to_thread(server.publish, "support")
        catalog = server.app.catalog
        stranger = BaseRef(name="other", fingerprint="sha256:" + "0" * 64, assumed=False)
        manifests = dict(catalog.adapter("support").manifests)
        changed = manifests["v2"].model_copy(update={"base": stranger})
        catalog.adapter("support").manifests["v2"] = changed  # type: ignore[index]
        async with stubs_to(server.target) as stubs:
            if alias == "shadow":
                call = stubs.adapters.SetShadow(shadow("support"))
            else:
                call = stubs.adapters.SetCanary(pb.SetCanaryRequest(name="support", version="v2", weight=0.5))
            refusal = await refused(all_of(call))
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "WRONG_BASE")
        assert stranger.fingerprint in refusal.message


async def test_a_version_that_does_not_load_is_no_shadow(stubs: Stubs, server: FakeServer, name: str) -> None:
    """The engine refuses it, so nothing is written."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    engine = engine_of(server)

    async def refuse(adapter: Any, *_: Any) -> None:
        raise InvalidAdapter("load", adapter.ref, "vLLM refuses to load it", fix="See the log.")

    engine.load_adapter = refuse  # type: ignore[method-assign]
    try:
        refusal = await refused(all_of(stubs.adapters.SetShadow(shadow(name))))
    finally:
        del engine.load_adapter  # type: ignore[method-assign]
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_ADAPTER")


async def test_watchers_hear_of_the_engine_if_they_want(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Loads, evictions and quarantines come between the alias moves; who did not ask for them gets the moves alone."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    everything = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(name=name, include_engine=True))
    moves = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(name=name))
    seen, plain = aiter(everything), aiter(moves)
    await anext(seen)
    await anext(plain)
    await all_of(stubs.adapters.SetShadow(shadow(name)))
    await stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter=f"{name}@v2"))
    engine_of(server).not_finite.add(f"{name}@v2")
    await refused(stubs.generation.Generate(ask(adapter=f"{name}@v2")))
    async with asyncio.timeout(5):
        kinds = [(await anext(seen)).WhichOneof("change") for _ in range(6)]
        assert (await anext(plain)).alias_changed.shadow_sample == 1.0
    everything.cancel()
    moves.cancel()
    assert kinds == ["loaded", "alias_changed", "evicted", "loaded", "quarantined", "evicted"]
