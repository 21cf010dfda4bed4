"""Managing calls through the router: to one replica, or to all that they concern, also while some are not well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2
from engine.client import Aborted, AsyncClient
from engine.client.testing import write_adapter
from engine.cluster.router.adapters import AdapterFanOut
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import all_of, chunk, parts, refused, upload

PROMOTION = adapters_pb2.SetAliasRequest(name="support", alias="current", version="v2")


async def test_a_publication_is_visible_everywhere(start: StartCluster) -> None:
    """What is published through the router, or at one server alone, all answer before they would look by themselves."""
    async with start(3) as cluster:
        await cluster.publish("support")
        for app in cluster.apps:
            assert "support" in app.catalog.adapters
        write_adapter(cluster.folder / "other", 9)
        header = adapters_pb2.PublishHeader(name="direct")
        target = cluster.addresses[0]
        await asyncio.to_thread(lambda: upload(target, parts(cluster.folder / "other", header)))
        for _ in range(3):
            assert (
                await cluster.client.generate(adapter="direct", prompt="x", temperature=0)
            ).text == "direct@v1 heard: x"


async def test_a_refused_upload_says_why(start: StartCluster) -> None:
    """A publication that the replica refuses in its middle ends with the replica's own status."""
    async with start() as cluster:
        target = f"127.0.0.1:{cluster.router.port}"
        messages = [chunk("a", b"x")] * 3

        def send() -> str:
            try:
                upload(target, messages)
            except grpc.RpcError as error:
                return str(error)
            return "accepted"

        assert "must be the first message" in await asyncio.to_thread(send)


async def test_a_malformed_upload_says_why(start: StartCluster) -> None:
    """A message that breaks a constraint in the middle of an upload is named, as by a server."""
    async with start() as cluster:
        header = adapters_pb2.PublishAdapterRequest(header=adapters_pb2.PublishHeader(name="support"))
        messages = [header, chunk("adapter_config.json", b"{}"), chunk("", b"x"), chunk("y", b"z")]

        def send() -> tuple[str, str]:
            try:
                upload(f"127.0.0.1:{cluster.router.port}", messages)
            except grpc.RpcError as error:
                return error.code().name, str(error)
            return "OK", ""

        code, text = await asyncio.to_thread(send)
        assert (code, "path" in text) == ("INVALID_ARGUMENT", True)


async def test_a_publication_goes_to_a_replica_of_its_base(start: StartCluster) -> None:
    """Which replica is less busy does not decide on which base an adapter counts as trained."""
    async with start(3, models=("main", "main", "other")) as cluster:
        bases = [app.generator.residency.base_fingerprint for app in cluster.apps if app.generator]
        assert bases[0] == bases[1] != bases[2]
        for number, (name, base) in enumerate((("a", bases[2]), ("b", bases[0]), ("c", ""), ("d", bases[2]))):
            write_adapter(cluster.folder / name, number)
            for link in cluster.router.fleet.usable():
                link.replica.sent += link.replica.report.base == (base or bases[0])  # the busier ones
            published = await cluster.client.adapters.publish(cluster.folder / name, name, base_fingerprint=base)
            assert published.base_fingerprint == (base or bases[0])


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


async def test_a_replica_that_is_gone_when_it_is_to_publish(start: StartCluster) -> None:
    """The caller is told to look; asked again, another replica publishes."""
    async with start(2, router={"poll_s": 60}) as cluster:
        first = cluster.router.fleet.usable()[0].address
        server = cluster.apps[cluster.addresses.index(first)]._server
        assert server
        await server.stop(None)
        with pytest.raises(Aborted) as lost:
            await cluster.publish("support")
        assert lost.value.reason == "REPLICA_LOST"
        assert await cluster.publish("support") == "v1"


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
