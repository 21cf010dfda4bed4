"""Moves, pins and unloads through the router: on all replicas that they concern, also while some are not well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest

from engine.api.loraplex.v1 import adapters_pb2
from engine.client import Aborted, AsyncClient
from engine.cluster.router import asking
from engine.cluster.router.adapters import AdapterFanOut
from engine.errors import RegistryUnavailable
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import all_of, refused

PROMOTION = adapters_pb2.SetAliasRequest(name="support", alias="current", version="v2")


async def test_a_replica_that_dies_while_it_moves_an_alias(start: StartCluster) -> None:
    """The caller is told to look whether it has moved; asked again, another replica moves it."""
    async with start(2, router={"poll_s": 60}) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        moving: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def move(app: Any, *_: Any, **__: Any) -> None:
            moving.set_result(app)
            await asyncio.Event().wait()

        for app in cluster.apps:
            app.catalog._registry.set_alias, app.own = partial(move, app), app.catalog._registry.set_alias
        promotion = asyncio.create_task(refused(all_of(cluster.stubs.adapters.SetAlias(PROMOTION))))
        await (await moving)._server.stop(None)
        refusal = await promotion
        assert (refusal.code.name, refusal.reason) == ("ABORTED", "REPLICA_LOST")
        assert (await cluster.client.adapters.get("support")).adapter.aliases["current"] == "v1"
        for app in cluster.apps:
            app.catalog._registry.set_alias = app.own
        messages = await all_of(cluster.stubs.adapters.SetAlias(PROMOTION))
        assert messages[-1].change.version == "v2"


@pytest.mark.parametrize("method", ["RemoveAlias", "EndCanary", "DeleteVersion"])
async def test_a_replica_that_dies_after_a_change(start: StartCluster, method: str) -> None:
    """Nobody makes the change a second time, to be refused; the caller is told to look, and the others know of it."""
    async with start(2, router={"poll_s": 60}) as cluster:
        for seed in (1, 2, 3):
            await cluster.publish("support", seed)
        test = adapters_pb2.SetAliasRequest(name="support", alias="test", version="v2")
        await all_of(cluster.stubs.adapters.SetAlias(test))
        canary = adapters_pb2.SetCanaryRequest(name="support", version="v2", weight=0.5)
        await all_of(cluster.stubs.adapters.SetCanary(canary))
        own_name, request = {
            "RemoveAlias": ("remove_alias", adapters_pb2.RemoveAliasRequest(name="support", alias="test")),
            "EndCanary": ("end_canary", adapters_pb2.EndCanaryRequest(name="support")),
            "DeleteVersion": ("delete_version", adapters_pb2.DeleteVersionRequest(name="support", version="v3")),
        }[method]
        made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def make(app: Any, own: Any, *args: Any, **options: Any) -> None:
            await own(*args, **options)
            made.set_result(app)
            await asyncio.Event().wait()

        for app in cluster.apps:
            registry = app.catalog._registry
            setattr(registry, own_name, partial(make, app, getattr(registry, own_name)))
        change = asyncio.create_task(refused(getattr(cluster.stubs.adapters, method)(request)))
        died = await made
        await died._server.stop(None)
        assert (await change).reason == "REPLICA_LOST"
        (left,) = [app for app in cluster.apps if app is not died]
        found = left.catalog.adapter("support")
        assert ("test" in found.aliases, found.canary is not None, "v3" in found.manifests) == (
            method != "RemoveAlias",
            method != "EndCanary",
            method != "DeleteVersion",
        )


async def test_a_promotion_where_the_registry_is_slow(start: StartCluster) -> None:
    """Seconds for a look at it are no failure."""
    async with start(2) as cluster:
        for seed in (1, 2):
            await cluster.publish("support", seed)
        told, own = cluster.router.fleet.adapter, [app.catalog._registry.survey for app in cluster.apps]

        async def survey(look: Any) -> Any:
            await asyncio.sleep(2.2)
            return await look()

        async def adapter(*asked: Any) -> Any:
            for app, look in zip(cluster.apps, own, strict=True):
                app.catalog._registry.survey = partial(survey, look)
            return await told(*asked)

        cluster.router.fleet.adapter = adapter  # type: ignore[method-assign]
        assert (await all_of(cluster.stubs.adapters.SetAlias(PROMOTION)))[-1].change.version == "v2"


async def test_a_watch_ends_with_its_replica(start: StartCluster) -> None:
    """Changes may be missed, so the caller has to begin anew, and may do so at once."""
    async with start(1) as cluster:
        watch = cluster.stubs.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        await watch.read()
        server = cluster.apps[0]._server
        assert server
        await server.stop(None)
        refusal = await refused(watch.read())
        assert (refusal.code.name, refusal.reason, refusal.retry_s) == ("UNAVAILABLE", "STREAM_LOST", 1.0)
        assert "changes may be missed" in refusal.message


async def test_two_rollbacks_at_once(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both want the version before this one: the slower one does not go forward to the bad one again."""
    warm, begun, go_on = AdapterFanOut._warm, asyncio.Event(), asyncio.Event()

    async def first_waits(*given: Any) -> AsyncIterator[Any]:
        if not begun.is_set():
            begun.set()
            await go_on.wait()
        async for progress in warm(*given):
            yield progress

    async with start(2) as cluster:
        for seed in (1, 2, 3):
            await cluster.publish("support", seed)
        await cluster.client.adapters.promote("support", "v2")
        await cluster.client.adapters.promote("support", "v3")
        monkeypatch.setattr(AdapterFanOut, "_warm", first_waits)
        slow = asyncio.create_task(cluster.client.adapters.rollback("support"))
        await begun.wait()
        assert (await cluster.client.adapters.rollback("support")).version == "v2"
        go_on.set()
        with pytest.raises(Aborted):
            await slow
        assert (await cluster.client.adapters.get("support")).adapter.aliases["current"] == "v2"


async def test_promotion_is_warm_before_it_switches(start: StartCluster) -> None:
    """When the alias moves, every replica that will be asked has the version; a rollback too; progress tells of it."""
    async with start(2) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        steps: list[str] = []
        change = await cluster.client.adapters.promote(
            "support", "v2", on_progress=lambda step: steps.append(step.detail)
        )
        assert change.version == "v2"
        assert "support@v2 is ready on 2 of 2 replicas" in steps
        assert all("support@v2" in cluster.residents(number) for number in range(2))
        assert (
            await cluster.client.generate(adapter="support", prompt="x", temperature=0)
        ).text == "support@v2 heard: x"
        change = await cluster.client.adapters.rollback("support")
        assert change.version == "v1"
        assert all("support@v1" in cluster.residents(number) for number in range(2))
        canary = await all_of(
            cluster.stubs.adapters.SetCanary(adapters_pb2.SetCanaryRequest(name="support", version="v2", weight=0.5))
        )
        assert canary[-1].change.canary_weight == 0.5
        ended = await cluster.stubs.adapters.EndCanary(adapters_pb2.EndCanaryRequest(name="support"))
        assert not ended.change.HasField("canary_weight")


async def test_a_promotion_asks_who_holds_the_adapter_now(start: StartCluster) -> None:
    """A replica that came to hold the adapter since it was last asked is warm too, though it is not preferred."""
    async with start(4, router={"poll_s": 60}) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        for address in cluster.addresses:
            async with AsyncClient(address) as beside:
                await beside.adapters.preload("support@v1")
        await cluster.client.adapters.promote("support", "v2")
        assert all("support@v2" in cluster.residents(number) for number in range(4))


async def test_a_promotion_that_one_replica_cannot_do_moves_nothing(start: StartCluster) -> None:
    """One replica refuses to load the version: the caller learns which and why, and the alias stays."""
    async with start(2) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)

        async def refuse(adapter: object) -> None:
            raise RuntimeError("no memory")

        cluster.engines[1].load_adapter = refuse  # type: ignore[method-assign]
        refusal = await refused(all_of(cluster.stubs.adapters.SetAlias(PROMOTION)))
        assert (refusal.code.name, refusal.reason) == ("FAILED_PRECONDITION", "NOT_EVERYWHERE")
        assert cluster.addresses[1] in refusal.message
        assert "the alias has not moved" in refusal.message
        assert dict((await cluster.client.adapters.get("support")).adapter.aliases)["current"] == "v1"


class Away:
    """A registry's listing that fails so many times."""

    def __init__(self, app: Any, times: int) -> None:
        self.times = times
        self._survey = app.catalog._registry.survey
        app.catalog._registry = MagicMock(wraps=app.catalog._registry, survey=self.survey)

    async def survey(self) -> Any:
        """Of the store."""
        self.times -= 1
        if self.times >= 0:
            raise RegistryUnavailable("listing", "away")
        return await self._survey()


async def test_a_move_that_a_replica_does_not_find_is_told(
    start: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store is away, so it goes on with the old version: the caller is told, and that the move stands."""
    monkeypatch.setattr(asking, "_FOLLOW_S", 0.3)
    async with start(2) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        test = adapters_pb2.SetAliasRequest(name="support", alias="test", version="v2")
        await all_of(cluster.stubs.adapters.SetAlias(test))
        away = Away(cluster.apps[1], 1000)
        for call in (
            all_of(cluster.stubs.adapters.SetAlias(PROMOTION)),
            cluster.stubs.adapters.RemoveAlias(adapters_pb2.RemoveAliasRequest(name="support", alias="test")),
        ):
            refusal = await refused(call)
            assert refusal.reason == "NOT_EVERYWHERE"
            assert "done on 1 of 2 replicas, and stands" in refusal.message
            assert cluster.addresses[1] in refusal.message
            assert "do not ask again" in refusal.metadata["fix"]
        away.times = 0
        assert (await cluster.client.adapters.rollback("support")).version == "v1"


async def test_a_replica_that_finds_a_move_a_moment_later_is_waited_for(start: StartCluster) -> None:
    """When the caller hears of a promotion, all know of it."""
    async with start(2) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        for app in cluster.apps:
            await cluster.client.adapters.preload("support@v2")
            Away(app, 3)
        await cluster.client.adapters.promote("support", "v2")
        for app in cluster.apps:
            assert app.catalog.adapter("support").aliases["current"] == "v2"


async def test_a_promotion_while_one_replica_is_paused_and_one_is_away(start: StartCluster) -> None:
    """The paused one, which soon gets requests again, knows of it; one that is away does not fail the promotion."""
    async with start(3) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        await cluster.end(2)
        cluster.pause(1)
        assert len(cluster.router.fleet.usable()) == 1
        await cluster.client.adapters.promote("support", "v2")
        assert cluster.apps[1].catalog.adapter("support").aliases["current"] == "v2"


async def test_preload_pin_and_unload_everywhere(start: StartCluster) -> None:
    """They reach every replica, and what no replica knows is not found."""
    async with start(3) as cluster:
        await cluster.publish("support")
        assert (await cluster.client.adapters.preload("support")).version == "v1"
        assert all(cluster.residents(number) == {"support@v1"} for number in range(3))
        await cluster.stubs.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(adapter="support", pinned=True))
        for app in cluster.apps:
            assert app.generator
            assert all(one.pinned for one in app.generator.residency.residents())
        unload = adapters_pb2.UnloadAdapterRequest(adapter="support")
        assert (await cluster.stubs.adapters.UnloadAdapter(unload)).was_resident
        assert not any(cluster.residents(number) for number in range(3))
        pin = adapters_pb2.PinAdapterRequest(adapter="support@v7", pinned=True)
        assert (await refused(cluster.stubs.adapters.PinAdapter(pin))).reason == "ADAPTER_NOT_FOUND"


async def test_pins_while_some_replicas_get_no_requests(start: StartCluster) -> None:
    """One that is paused is asked all the same, one that is about to end is not, and one that is away is named."""
    async with start(4) as cluster:
        await cluster.publish("support")
        cluster.apps[3].admission.drain()
        await cluster.look(3)
        cluster.pause(1)
        pin = adapters_pb2.PinAdapterRequest(adapter="support", pinned=True)
        await cluster.stubs.adapters.PinAdapter(pin)
        assert [bool(cluster.residents(number)) for number in range(4)] == [True, True, True, False]
        await cluster.end(2)
        refusal = await refused(cluster.stubs.adapters.PinAdapter(pin))
        assert refusal.reason == "NOT_EVERYWHERE"
        assert f"done on 2 of 3 replicas, and it stands there ({cluster.addresses[2]}: it does not" in refusal.message
        unload = adapters_pb2.UnloadAdapterRequest(adapter="support")
        assert cluster.addresses[2] in (await refused(cluster.stubs.adapters.UnloadAdapter(unload))).message
