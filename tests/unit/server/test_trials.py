"""Canaries that are judged: ended early with the numbers, promoted only after enough, decided once among several servers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.client.adapters import trial
from engine.client.testing import FakeServer, fake_server
from engine.errors import LoraplexError, RegistryUnavailable
from engine.registry.catalog import Catalog
from engine.registry.manifest import AliasChange, Trial
from engine.registry.registry import Registry
from engine.registry.store import Store
from engine.runtime.judgement import ENOUGH
from engine.server.trials import Decision, Trials, Watched
from tests.unit.server.conftest import Stubs, all_of, ask, engine_of, refused, stubs_to, until

Code = grpc.StatusCode
SECONDS = 600.0


class AtOnce:
    """Moves that need no engine; what they are told to raise, they raise."""

    def __init__(self) -> None:
        self.problem: LoraplexError | None = None

    async def move(self, *args: Any) -> AliasChange:
        """Switch."""
        if self.problem:
            raise self.problem
        switch: Callable[[], Awaitable[AliasChange]] = args[3]
        return await switch()


class Judge:
    """A server's judge with clocks of its own: `wall` may jump, `steady` never does."""

    def __init__(self, server: FakeServer, who: str = "server a") -> None:
        self.registry = Registry(Store.open(server.app.settings.registry))
        self.catalog = Catalog(self.registry)
        self.moves = AtOnce()
        self.steady, self.wall = 1000.0, datetime.now(UTC)
        assert server.app.generator
        self.trials = Trials(
            self.registry,
            self.catalog,
            server.app.generator.residency,
            self.moves,  # type: ignore[arg-type]
            who,
            lambda: self.steady,
            lambda: self.wall,
        )

    async def start(self, name: str, then: Any = "promote") -> None:
        """Start a canary and see it."""
        await self.registry.set_canary(name, "v2", 0.1, trial=Trial(seconds=SECONDS, then=then))
        await self.look()

    async def look(self, later_s: float = 0.0) -> None:
        """Look, some time later."""
        self.steady += later_s
        self.wall += timedelta(seconds=later_s)
        await self.catalog.refresh()
        await self.trials.look()

    def feed(self, name: str, side: str, requests: int, failed: int = 0, ttft_s: float = 0.1) -> None:
        """Let a side have had requests."""
        canary = self.catalog.adapter(name).canary
        assert canary
        rng = random.Random(requests)
        for number in range(requests):
            bad = number < failed
            self.trials.watch(canary).tallies[side].add(failed=bad, ttft_s=0 if bad else ttft_s + rng.random() / 100)

    async def log(self, name: str) -> list[tuple[str, str | None, bool, str]]:
        """The moves after the canary's start: alias, version, whether it is a canary's, who."""
        history = await self.registry.history(name)
        return [(move.alias, move.version, move.split is not None, move.actor) for move in history[2:]]


@pytest.fixture
async def judge(server: FakeServer, name: str) -> Judge:
    """A judge of two versions of `name`."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    made = Judge(server)
    await made.catalog.refresh()
    return made


async def test_a_bad_canary_ends_early(judge: Judge, name: str) -> None:
    """Its end is in the log at once, with who and the numbers; current still names what it did."""
    await judge.start(name)
    judge.feed(name, "current", 200)
    judge.feed(name, "canary", 20, failed=12)
    await judge.look(10)
    assert await judge.log(name) == [("canary", "v2", False, "server a")]
    reason = (await judge.registry.history(name))[-1].reason
    assert "12 of 20 failed (current: 0 of 200)" in reason
    assert judge.catalog.adapter(name).canary is None
    assert judge.catalog.adapter(name).aliases["current"] == "v1"


async def test_canaries_that_change_while_another_is_decided(
    judge: Judge, server: FakeServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is gone by its turn, version and all, is passed over; a newer one in its place keeps what is known of it."""
    gone, replaced = f"{name}-gone", f"{name}-replaced"
    for other in (gone, gone, replaced, replaced, replaced):
        await asyncio.to_thread(server.publish, other)
    for each in (name, gone, replaced):
        await judge.start(each)
    for each in (name, gone, replaced):
        judge.feed(each, "current", 200)
        judge.feed(each, "canary", 20, failed=12)
    plainly = judge.registry.end_canary

    async def end_canary(ended: str, **more: Any) -> AliasChange:
        assert ended == name
        await plainly(gone)
        await judge.registry.remove_alias(gone, "canary")
        await judge.registry.delete_version(gone, "v2")
        await judge.registry.set_canary(replaced, "v3", 0.1, trial=Trial(seconds=SECONDS))
        await judge.catalog.refresh()
        judge.feed(replaced, "canary", 5)
        return await plainly(ended, **more)

    monkeypatch.setattr(judge.registry, "end_canary", end_canary)
    await judge.look(10)
    assert judge.catalog.adapter(name).canary is None
    assert judge.catalog.adapter(gone).canary is None
    canary = judge.catalog.adapter(replaced).canary
    assert canary is not None
    assert canary.version == "v3"
    assert judge.trials.watch(canary).sides[0].requests == 5


async def test_a_bug_about_one_canary(
    judge: Judge, server: FakeServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge goes on judging: others at once, and the one again at the next look."""
    other = f"{name}-other"
    for _ in range(2):
        await asyncio.to_thread(server.publish, other)
    for each in (name, other):
        await judge.start(each)
    for each in (name, other):
        judge.feed(each, "current", 200)
        judge.feed(each, "canary", 20, failed=12)
    plainly, failing = judge.trials.decide, {name}

    def decide(watched: Watched) -> Decision:
        if watched.canary.name in failing:
            raise KeyError(watched.canary.name)
        return plainly(watched)

    monkeypatch.setattr(judge.trials, "decide", decide)
    monkeypatch.setattr("engine.server.trials._LOOK_S", 0.01)
    running = asyncio.create_task(judge.trials.run())
    await until(lambda: judge.catalog.adapter(other).canary is None)
    assert judge.catalog.adapter(name).canary is not None
    failing.clear()
    await until(lambda: judge.catalog.adapter(name).canary is None)
    assert not running.done()
    running.cancel()


async def test_a_slow_canary_ends_early(judge: Judge, name: str) -> None:
    """Twice as slow as allowed is enough, and the reason says how slow."""
    await judge.start(name)
    judge.feed(name, "current", 200, ttft_s=0.1)
    judge.feed(name, "canary", 40, ttft_s=0.3)
    await judge.look(10)
    assert await judge.log(name) == [("canary", "v2", False, "server a")]
    assert "above 1.5 times" in (await judge.registry.history(name))[-1].reason


async def test_a_good_canary_is_promoted_at_its_time(judge: Judge, name: str) -> None:
    """Not a second before; its promotion ends it, and says why."""
    await judge.start(name)
    judge.feed(name, "current", 500)
    judge.feed(name, "canary", ENOUGH)
    await judge.look(SECONDS - 1)
    assert await judge.log(name) == []
    await judge.look(2)
    assert await judge.log(name) == [("current", "v2", False, "server a")]
    assert "did well" in (await judge.registry.history(name))[-1].reason
    assert judge.catalog.adapter(name).canary is None


async def test_it_ends_at_its_time_unless_told_to_promote(judge: Judge, name: str) -> None:
    """`then` "end" needs no requests."""
    await judge.start(name, then="end")
    await judge.look(SECONDS + 1)
    assert await judge.log(name) == [("canary", "v2", False, "server a")]


async def test_too_few_requests_promote_nothing(judge: Judge, name: str) -> None:
    """A canary that hardly anybody asked is waited for a while, and then ended."""
    await judge.start(name)
    judge.feed(name, "current", 500)
    judge.feed(name, "canary", ENOUGH - 1)
    await judge.look(SECONDS + 1)
    assert await judge.log(name) == []
    await judge.look(0.1 * SECONDS)
    assert await judge.log(name) == [("canary", "v2", False, "server a")]
    assert "too few requests" in (await judge.registry.history(name))[-1].reason


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
async def test_a_clock_that_jumps_changes_nothing(judge: Judge, name: str, jump_s: float) -> None:
    """However the wall clock jumps while the server runs, the canary gets its time by the steady clock."""
    await judge.start(name)
    judge.feed(name, "current", 500)
    judge.feed(name, "canary", 100)
    judge.wall += timedelta(seconds=jump_s)
    await judge.look(SECONDS - 10)
    assert await judge.log(name) == []
    await judge.look(11)
    assert await judge.log(name) == [("current", "v2", False, "server a")]


async def test_a_restart_forgets_no_canary(judge: Judge, server: FakeServer, name: str) -> None:
    """Another process goes on with the time that is left by the log, and judges by what it sees itself."""
    await judge.start(name)
    judge.feed(name, "canary", 100)
    other = Judge(server, "server b")
    other.wall += timedelta(seconds=SECONDS - 100)
    await other.look()
    other.feed(name, "current", 500)
    other.feed(name, "canary", ENOUGH)
    await other.look(99)
    assert await other.log(name) == []
    await other.look(2)
    assert await other.log(name) == [("current", "v2", False, "server b")]


async def test_a_clock_that_jumped_before_a_restart_promotes_nothing(
    judge: Judge, server: FakeServer, name: str
) -> None:
    """A server that comes up a year ahead takes the time for over, but promotes only what it has seen for long enough."""
    await judge.start(name)
    other = Judge(server, "server b")
    other.wall += timedelta(days=365)
    await other.look()
    other.feed(name, "current", 500)
    other.feed(name, "canary", 500)
    await other.look(0.05 * SECONDS)
    assert await other.log(name) == []
    other.feed(name, "canary", 100, failed=50)
    await other.look(0.06 * SECONDS)
    assert await other.log(name) == [("canary", "v2", False, "server b")]


async def test_two_servers_decide_once(judge: Judge, server: FakeServer, name: str) -> None:
    """Both look at the same time, one at a bad and one at a good canary: one entry in the log."""
    await judge.start(name)
    other = Judge(server, "server b")
    await other.look()
    for each in (judge, other):
        each.feed(name, "current", 500)
        each.steady += SECONDS + 1
    judge.feed(name, "canary", 100)
    other.feed(name, "canary", 100, failed=80)
    await asyncio.gather(judge.trials.look(), other.trials.look())
    assert len(await judge.log(name)) == 1
    await judge.look(1)
    await other.look(1)
    assert len(await judge.log(name)) == 1


async def test_an_operator_is_obeyed(judge: Judge, name: str) -> None:
    """Whoever ends, promotes or changes the canary first leaves the judge nothing to decide, even if it has not noticed yet."""
    await judge.start(name)
    judge.feed(name, "current", 500)
    judge.feed(name, "canary", 100)
    judge.steady += SECONDS + 1
    await judge.registry.set_canary(name, "v2", 0.2)  # not judged
    await judge.trials.look()
    assert await judge.log(name) == [("canary", "v2", True, "")]
    await judge.look(10 * SECONDS)
    assert await judge.log(name) == [("canary", "v2", True, "")]


async def test_a_registry_that_is_away_keeps_no_bad_canary(judge: Judge, name: str) -> None:
    """While its end cannot be written it gets no more requests here; when the registry is back, its end is written."""
    from engine.registry.names import AdapterRef

    await judge.start(name)
    judge.feed(name, "current", 200)
    judge.feed(name, "canary", 20, failed=20)
    real, store = Store.create, judge.registry._store

    async def away(path: str, data: bytes) -> None:
        raise RegistryUnavailable(f"writing {path}", "not reachable")

    store.create = away  # type: ignore[method-assign]
    await judge.look(1)
    assert await judge.log(name) == []
    routes = [judge.catalog.route(AdapterRef.parse(name), f"k{number}") for number in range(200)]
    assert {route.manifest and route.manifest.version for route in routes} == {"v1"}
    del store.create  # type: ignore[method-assign]
    assert Store.create is real
    await judge.look(1)
    assert await judge.log(name) == [("canary", "v2", False, "server a")]


async def test_a_version_that_loads_no_more_is_not_promoted(judge: Judge, name: str) -> None:
    """The canary ends instead, and the reason is the engine's; while the store is away it is tried again."""
    from engine.errors import InvalidAdapter

    await judge.start(name)
    judge.feed(name, "current", 500)
    judge.feed(name, "canary", 100)
    judge.moves.problem = RegistryUnavailable("fetching", "not reachable")
    await judge.look(SECONDS + 1)
    assert await judge.log(name) == []
    judge.moves.problem = InvalidAdapter("load", "x@v2", "vLLM refuses to load it", fix="See the log.")
    await judge.look(1)
    assert await judge.log(name) == [("canary", "v2", False, "server a")]
    assert "refuses to load" in (await judge.registry.history(name))[-1].reason


# Over a socket


def judged(name: str, weight: float = 0.5, **fields: Any) -> pb.SetCanaryRequest:
    """A request for a canary that is judged for ten minutes."""
    return pb.SetCanaryRequest(name=name, version="v2", weight=weight, trial=trial(SECONDS), **fields)


async def test_a_canary_that_makes_nan_is_gone_at_once() -> None:
    """Its first NaN quarantines it; the judge ends it; the caller's next request is answered by current."""
    with fake_server() as server:
        for _ in range(2):
            await asyncio.to_thread(server.publish, "support")
        async with stubs_to(server.target) as stubs:
            await all_of(stubs.adapters.SetCanary(judged("support", 0.9)))
            engine_of(server).not_finite.add("support@v2")
            failed = 0
            while not failed:
                with suppress(grpc.RpcError):
                    await stubs.generation.Generate(ask(adapter="support"))
                    continue
                failed += 1
            server.run(server.app.trials.look())
            found = await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name="support"))
            assert not found.adapter.HasField("canary")
            assert "not a number" in found.history[-1].reason
            assert found.history[-1].actor.startswith("server ")
            for _ in range(10):
                answer = await stubs.generation.Generate(ask(adapter="support"))
                assert answer.adapter.version == "v1"


async def test_the_report_counts_both_sides(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Requests that the canary shares out are counted on their side; explicit versions and refused callers are not."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    refusal = await refused(stubs.adapters.GetCanaryReport(pb.GetCanaryReportRequest(name=name)))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW")
    await all_of(stubs.adapters.SetCanary(judged(name, actor="me")))
    answers = [await stubs.generation.Generate(ask(adapter=name)) for _ in range(30)]
    await stubs.generation.Generate(ask(adapter=f"{name}@v2"))
    report = await stubs.adapters.GetCanaryReport(pb.GetCanaryReportRequest(name=name))
    on_canary = sum(answer.adapter.version == "v2" for answer in answers)
    assert (report.canary_side.requests, report.current_side.requests) == (on_canary, 30 - on_canary)
    assert report.canary_side.failed == 0
    assert report.current_side.time_to_first_token.p50.ToTimedelta() >= timedelta(0)
    assert "s left, then end" in report.verdict
    assert report.canary.trial.max_error_rate == 0.02
    assert report.canary.ends_at.ToDatetime(UTC) > datetime.now(UTC) + timedelta(seconds=SECONDS - 60)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight": 0.0}, "weight"),
        ({"weight": 1.0}, "weight"),
        ({"trial": pb.CanaryTrial()}, "trial.duration"),
        ({"trial": trial(0.5)}, "trial.duration"),
        ({"trial": trial(31 * 86_400)}, "trial.duration"),
        ({"trial": trial(60, max_error_rate=1.5)}, "trial.max_error_rate"),
        ({"trial": trial(60, max_error_rate=float("nan"))}, "trial.max_error_rate"),
        ({"trial": trial(60, max_ttft_ratio=0.0)}, "trial.max_ttft_ratio"),
    ],
)
async def test_refusals(stubs: Stubs, server: FakeServer, name: str, change: dict[str, Any], field: str) -> None:
    """A trial that compares with nothing, has no time or an impossible bound is refused, and nothing is written."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    request = pb.SetCanaryRequest(**({"name": name, "version": "v2", "weight": 0.5, "trial": trial(60)} | change))
    refusal = await refused(all_of(stubs.adapters.SetCanary(request)))
    assert (refusal.code, list(refusal.violations)) == (Code.INVALID_ARGUMENT, [field])
    assert len((await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))).history) == 1


@pytest.mark.parametrize("meanwhile", ["end", "promote", "another"])
async def test_a_canary_that_was_overtaken_while_warming_does_not_begin(meanwhile: str) -> None:
    """Ended, or something else promoted, while its version was being loaded: ABORTED, and no share goes to it."""
    with fake_server() as server:
        for _ in range(3):
            await asyncio.to_thread(server.publish, "support")
        async with stubs_to(server.target) as stubs:
            await all_of(stubs.adapters.SetCanary(pb.SetCanaryRequest(name="support", version="v2", weight=0.1)))
            engine, may_load, loading = engine_of(server), asyncio.Event(), []
            original = type(engine).load_adapter

            async def slow(adapter: Any, *others: Any) -> None:
                loading.append(adapter)
                while not may_load.is_set():
                    await asyncio.sleep(0.005)
                await original(engine, adapter, *others)

            engine.load_adapter = slow  # type: ignore[method-assign]
            request = pb.SetCanaryRequest(name="support", version="v3", weight=0.5)
            warming = asyncio.create_task(refused(all_of(stubs.adapters.SetCanary(request))))
            await until(lambda: loading)
            match meanwhile:
                case "end":
                    await stubs.adapters.EndCanary(pb.EndCanaryRequest(name="support"))
                case "promote":
                    await all_of(
                        stubs.adapters.SetAlias(pb.SetAliasRequest(name="support", alias="current", version="v2"))
                    )
                case _:
                    await all_of(
                        stubs.adapters.SetCanary(pb.SetCanaryRequest(name="support", version="v2", weight=0.2))
                    )
            may_load.set()
            refusal = await warming
            assert (refusal.code, refusal.reason) == (Code.ABORTED, "OVERTAKEN")
            found = await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name="support"))
            assert found.adapter.canary.version != "v3"
            assert len(found.history) == 3
