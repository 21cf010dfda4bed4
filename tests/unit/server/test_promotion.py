"""Aliases and memory: warm, then switch; roll back under traffic; watch; pin and unload."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import engine_pb2
from engine.api.loraplex.v1 import generation_pb2 as gpb
from engine.client import AsyncClient
from engine.client.testing import FakeServer, fake_server
from engine.errors import InvalidAdapter
from engine.registry.manifest import AliasChange
from engine.registry.registry import Registry
from engine.registry.store import Store
from engine.runtime.fake import FakeEngine
from engine.server.moves import Moves
from tests.unit.runtime.conftest import World
from tests.unit.server.conftest import (
    Stubs,
    all_of,
    ask,
    engine_of,
    first_of,
    refused,
    stubs_to,
    until,
)

Code = grpc.StatusCode


async def publish(server: FakeServer, name: str, count: int = 1) -> list[str]:
    """Publish some versions."""
    return [await asyncio.to_thread(server.publish, name) for _ in range(count)]


def move(name: str, version: str, alias: str = "current", **fields: str) -> pb.SetAliasRequest:
    """A request to point an alias at a version."""
    return pb.SetAliasRequest(name=name, alias=alias, version=version, **fields)


async def text(stubs: Stubs, adapter: str) -> str:
    """What an adapter answers."""
    return (await stubs.generation.Generate(ask(adapter=adapter))).completions[0].text


async def resident(stubs: Stubs, name: str) -> dict[str, Any]:
    """Versions of an adapter that the engine holds."""
    engine = await stubs.engine.GetEngine(engine_pb2.GetEngineRequest())
    return {one.version: one for one in engine.resident if one.name == name}


async def test_promote(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Loading, probing, switching, done: in this order, and the next request gets the new version."""
    await publish(server, name, 2)
    assert await text(stubs, name) == f"{name}@v1 heard: hi"
    *progress, last = await all_of(stubs.adapters.SetAlias(move(name, "v2", actor="me", reason="better")))
    assert [message.progress.stage for message in progress] == ["loading", "loading", "probing", "switching"]
    fractions = [message.progress.fraction for message in progress]
    assert fractions == sorted(fractions)
    assert (last.change.alias, last.change.version, last.change.actor, last.change.reason) == (
        "current",
        "v2",
        "me",
        "better",
    )
    assert await text(stubs, name) == f"{name}@v2 heard: hi"
    assert await text(stubs, f"{name}@v1") == f"{name}@v1 heard: hi"


async def test_warm_before_the_switch(stubs: Stubs, server: FakeServer, name: str) -> None:
    """The alias moves only once the version is in the engine, so nobody waits for it."""
    await publish(server, name, 2)
    call = stubs.adapters.SetAlias(move(name, "v2"))
    async for message in call:
        if message.progress.stage == "switching":
            assert "v2" in await resident(stubs, name)
    answer = await stubs.generation.Generate(ask(adapter=name))
    assert answer.adapter.version == "v2"
    assert answer.timings.adapter_wait.ToTimedelta().total_seconds() == 0


@pytest.mark.slow
async def test_in_flight_requests_keep_their_version() -> None:
    """A stream that began on v1 ends on v1 while new calls get v2."""
    with fake_server() as server:
        await publish(server, "support", 2)
        async with stubs_to(server.target) as stubs:
            await text(stubs, "support")
            engine_of(server).token_interval_s = 0.01
            request = gpb.GenerateStreamRequest(request=ask("hello", "support"))
            stream = stubs.generation.GenerateStream(request)
            first = await first_of(stream)
            engine_of(server).token_interval_s = 0.001
            await all_of(stubs.adapters.SetAlias(move("support", "v2")))
            assert await text(stubs, "support") == "support@v2 heard: hi"
            rest = await all_of(stream)
            assert first.text + "".join(message.text for message in rest) == "support@v1 heard: hello"
            assert first.adapter.version == "v1"


async def test_expected_version(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Somebody else was faster: ABORTED, and nothing moves."""
    await publish(server, name, 3)
    await all_of(stubs.adapters.SetAlias(move(name, "v2", expected_version="v1")))
    refusal = await refused(all_of(stubs.adapters.SetAlias(move(name, "v3", expected_version="v1"))))
    assert (refusal.code, refusal.reason) == (Code.ABORTED, "ALIAS_MOVED")
    assert "v2" in refusal.message
    assert await text(stubs, name) == f"{name}@v2 heard: hi"


async def test_promoting_a_version_that_does_not_load(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A version that the engine refuses is never switched to."""
    await publish(server, name, 2)
    engine = engine_of(server)
    original = engine.load_adapter

    async def refuse(adapter: Any, *_: Any) -> None:
        raise InvalidAdapter("load", adapter.name.partition("#")[0], "vLLM refuses to load it", fix="See the log.")

    engine.load_adapter = refuse  # type: ignore[method-assign]
    try:
        refusal = await refused(all_of(stubs.adapters.SetAlias(move(name, "v2"))))
    finally:
        engine.load_adapter = original  # type: ignore[method-assign]
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_ADAPTER")
    assert await text(stubs, name) == f"{name}@v1 heard: hi"
    history = (await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))).history
    assert len(history) == 1


async def test_cancelled_promotion(server: FakeServer, stubs: Stubs, name: str) -> None:
    """A caller who leaves before the switch leaves the alias where it was."""
    await publish(server, name, 2)
    engine = engine_of(server)
    original, entered = FakeEngine.load_adapter, asyncio.Event()
    loop = asyncio.get_running_loop()

    async def slow(adapter: Any, *_: Any) -> None:
        loop.call_soon_threadsafe(entered.set)
        await asyncio.sleep(0.2)
        await original(engine, adapter)

    engine.load_adapter = slow  # type: ignore[method-assign]
    try:
        call = stubs.adapters.SetAlias(move(name, "v2"))
        await first_of(call)
        await asyncio.wait_for(entered.wait(), 5)
        call.cancel()
        await asyncio.sleep(0.4)
    finally:
        del engine.load_adapter  # type: ignore[method-assign]
    assert await text(stubs, name) == f"{name}@v1 heard: hi"
    assert list(await resident(stubs, name)) == ["v1", "v2"]  # loaded all the same, and nobody's


async def test_rollback(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A rollback names what the alias named before, and needs no load."""
    await publish(server, name, 2)
    await text(stubs, name)
    await all_of(stubs.adapters.SetAlias(move(name, "v2")))
    *progress, last = await all_of(stubs.adapters.RollbackAlias(pb.RollbackAliasRequest(name=name, actor="me")))
    assert last.change.version == "v1"
    assert last.change.reason == "rollback"
    assert [message.progress.stage for message in progress] == ["switching"]
    assert await text(stubs, name) == f"{name}@v1 heard: hi"


async def test_rollback_from_quarantine(stubs: Stubs, server: FakeServer, name: str) -> None:
    """The way out of a version in quarantine is open even while an answer of it is on its way."""
    await publish(server, name, 2)
    await all_of(stubs.adapters.SetAlias(move(name, "v2")))
    residency = server.app.residency
    found = residency.find(name, "v2")
    assert found
    bad = found.manifest
    async with residency.lease(bad):
        residency.quarantine(bad)
        await all_of(stubs.adapters.RollbackAlias(pb.RollbackAliasRequest(name=name)))
    assert await text(stubs, name) == f"{name}@v1 heard: hi"


async def test_nothing_to_roll_back(stubs: Stubs, server: FakeServer, name: str) -> None:
    """With one version there is nothing before it."""
    await publish(server, name)
    refusal = await refused(all_of(stubs.adapters.RollbackAlias(pb.RollbackAliasRequest(name=name))))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW")


async def test_rollback_with_room_for_two() -> None:
    """The previous version survives the promotion even when the engine is full, so that a rollback is instant."""
    with fake_server(max_resident=2) as server:
        await publish(server, "support", 2)
        await publish(server, "other")
        async with stubs_to(server.target) as stubs:
            await text(stubs, "support")
            await text(stubs, "other")
            await all_of(stubs.adapters.SetAlias(move("support", "v2")))
            assert list(await resident(stubs, "support")) == ["v1", "v2"]


def no_report(_stage: str, _detail: str) -> None:
    """Nobody wants to know."""


async def test_warm_until_it_has_switched(tmp_path: Path) -> None:
    """A switch takes its time, in which others load what they need: not in the place of the version that is to come."""
    world = World(tmp_path, FakeEngine())
    old, new = [await world.publish("support") for _ in range(2)]
    others = [await world.publish(name) for name in "xyz"]
    residency = world.residency(capacity=2)
    await residency.preload(old)

    async def switch() -> AliasChange:
        for other in others:
            await residency.preload(other)
        return await world.registry.set_alias("support", "current", "v2")

    await Moves(world.catalog, residency).move("support", "current", "v2", switch, no_report)
    assert residency.is_resident(new.digest)
    assert world.catalog.adapter("support").aliases["current"] == "v2"
    assert not residency.claimed


async def test_promotions_at_once(tmp_path: Path) -> None:
    """Promotions that wait for the slots that requests use do not wait for each other when these have ended."""
    world = World(tmp_path, FakeEngine())
    a, b = [await world.publish(name) for name in "ab"]
    residency = world.residency(capacity=2)
    moves = Moves(world.catalog, residency)

    async def promote(name: str) -> AliasChange:
        await world.publish(name)
        switch = partial(world.registry.set_alias, name, "current", "v2")
        return await moves.move(name, "current", "v2", switch, no_report)

    async with residency.lease(a), residency.lease(b):
        promotions = [asyncio.create_task(promote(name)) for name in "ab"]
        await until(lambda: len(residency.claimed) >= 2)
    changes = await asyncio.gather(*promotions)
    assert [change.version for change in changes] == ["v2", "v2"]
    assert not residency.claimed


async def test_canary(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Another alias is another name, and can be removed."""
    await publish(server, name, 2)
    await all_of(stubs.adapters.SetAlias(move(name, "v2", alias="canary")))
    assert await text(stubs, f"{name}@canary") == f"{name}@v2 heard: hi"
    assert await text(stubs, name) == f"{name}@v1 heard: hi"
    removed = await stubs.adapters.RemoveAlias(pb.RemoveAliasRequest(name=name, alias="canary", actor="me"))
    assert (removed.change.alias, removed.change.version) == ("canary", "")
    assert (await refused(stubs.generation.Generate(ask(adapter=f"{name}@canary")))).code is Code.NOT_FOUND


@pytest.mark.slow
@pytest.mark.parametrize("clients", [4])
async def test_rollback_under_traffic(clients: int) -> None:
    """While an alias goes back and forth twenty times, no request fails and each answer is of the version it names."""
    with fake_server(max_running=clients) as server:
        await publish(server, "support", 2)
        engine_of(server).token_interval_s = 0.0003
        stop = asyncio.Event()
        versions: list[str] = []

        async def client(number: int) -> None:
            async with AsyncClient(server.target, retries=0) as one:
                while not stop.is_set():
                    if number % 2:
                        answer = await one.generate(adapter="support", prompt="hi", temperature=0)
                        said, who = answer.text, answer.adapter
                    else:
                        chunks = [chunk async for chunk in one.stream(adapter="support", prompt="hi", temperature=0)]
                        said, who = "".join(chunk.text for chunk in chunks), chunks[0].adapter
                    assert said == f"{who} heard: hi"
                    versions.append(who.version)

        tasks = [asyncio.create_task(client(number)) for number in range(clients)]
        async with AsyncClient(server.target, timeout_s=20) as admin:
            await until(lambda: len(versions) > clients)
            for _ in range(20):
                await admin.adapters.promote("support", "v2")
                await admin.adapters.rollback("support")
            stop.set()
            await asyncio.gather(*tasks)
            assert len((await admin.adapters.get("support")).history) == 41
        assert {"v1", "v2"} == set(versions)
        assert not engine_of(server).running


async def test_delete(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A version that an alias names stays; another one goes, and its number with it."""
    await publish(server, name, 2)
    refusal = await refused(stubs.adapters.DeleteVersion(pb.DeleteVersionRequest(name=name, version="v1")))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW")
    await stubs.adapters.DeleteVersion(pb.DeleteVersionRequest(name=name, version="v2"))
    assert (await refused(stubs.generation.Generate(ask(adapter=f"{name}@v2")))).code is Code.NOT_FOUND
    assert await publish(server, name) == ["v3"]


async def test_delete_while_in_flight() -> None:
    """A request in flight on a version that is deleted finishes."""
    with fake_server() as server:
        await publish(server, "support", 2)
        async with stubs_to(server.target) as stubs:
            await text(stubs, "support@v2")
            engine_of(server).token_interval_s = 0.01
            stream = stubs.generation.GenerateStream(gpb.GenerateStreamRequest(request=ask("hi", "support@v2")))
            first = await first_of(stream)
            await stubs.adapters.DeleteVersion(pb.DeleteVersionRequest(name="support", version="v2"))
            rest = await all_of(stream)
            assert first.text + "".join(message.text for message in rest) == "support@v2 heard: hi"


async def test_pinned_and_deleted(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A deleted version that requests use can still be unpinned; its slot is free with the last of them."""
    await publish(server, name, 2)
    await stubs.adapters.PinAdapter(pb.PinAdapterRequest(adapter=f"{name}@v2", pinned=True))
    found = server.app.residency.find(name, "v2")
    assert found
    async with server.app.residency.lease(found.manifest):
        await Registry(Store.open(server.app.settings.registry)).delete_version(name, "v2")  # by another replica
        await stubs.adapters.PinAdapter(pb.PinAdapterRequest(adapter=f"{name}@v2", pinned=False))
        refusal = await refused(stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter=f"{name}@v2")))
        assert refusal.reason == "NOT_ALLOWED_NOW"
    await until(lambda: not server.app.residency.find(name, "v2"))
    refusal = await refused(stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter=f"{name}@v2")))
    assert refusal.reason == "ADAPTER_NOT_FOUND"


async def test_watch(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A watcher hears of every change of its adapter, in order, and of no other's."""
    watch = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(name=name))
    begun = await first_of(watch)
    assert begun.WhichOneof("change") is None
    await publish(server, f"{name}-other")
    await publish(server, name, 2)
    await all_of(stubs.adapters.SetAlias(move(name, "v2")))
    await stubs.adapters.DeleteVersion(pb.DeleteVersionRequest(name=name, version="v1"))
    seen = [await asyncio.wait_for(first_of(watch), 5) for _ in range(5)]
    watch.cancel()
    assert {message.name for message in seen} == {name}
    assert [message.WhichOneof("change") for message in seen] == [
        "published",
        "alias_changed",
        "published",
        "alias_changed",
        "deleted_version",
    ]
    assert seen[3].alias_changed.version == "v2"
    assert seen[4].deleted_version == "v1"


async def test_watch_all(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Without a name, a watcher hears of all adapters."""
    watch = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    await first_of(watch)
    await publish(server, name)
    assert (await asyncio.wait_for(first_of(watch), 5)).name == name
    watch.cancel()


async def test_another_process_changes_the_registry(stubs: Stubs, server: FakeServer, folder: Path, name: str) -> None:
    """What another server writes into the registry is served here within the refresh time."""
    from engine.registry.checks import Limits, check_adapter
    from engine.registry.fingerprint import read_base

    other = Registry(Store.open(server.app.settings.registry))
    checked = check_adapter(folder, read_base(server.app.settings.model), Limits(max_rank=8, max_bytes=10**6))
    watch = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(name=name))
    await first_of(watch)
    await other.publish(folder, checked, name=name)
    assert (await asyncio.wait_for(first_of(watch), 2)).published.version == "v1"
    assert (await asyncio.wait_for(first_of(watch), 2)).alias_changed.alias == "current"
    assert await text(stubs, name) == f"{name}@v1 heard: hi"
    await other.set_alias(name, "canary", "v1")
    assert (await asyncio.wait_for(first_of(watch), 2)).alias_changed.alias == "canary"
    watch.cancel()
    assert await text(stubs, f"{name}@canary") == f"{name}@v1 heard: hi"


async def test_preload_and_unload(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Preload loads, unload takes out, and the next request loads again."""
    await publish(server, name)
    *progress, last = await all_of(stubs.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter=name)))
    assert [message.progress.stage for message in progress] == ["loading", "loading", "probing"]
    assert last.version.version == "v1"
    assert list(await resident(stubs, name)) == ["v1"]
    assert (await stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter=name))).was_resident
    assert not (await stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter=name))).was_resident
    assert not await resident(stubs, name)
    answer = await stubs.generation.Generate(ask(adapter=name))
    assert answer.timings.adapter_wait.ToTimedelta().total_seconds() > 0


async def test_unload_while_in_use() -> None:
    """A version that a stream uses is not unloaded."""
    with fake_server() as server:
        await publish(server, "support")
        async with stubs_to(server.target) as stubs:
            await text(stubs, "support")
            engine_of(server).token_interval_s = 0.02
            stream = stubs.generation.GenerateStream(gpb.GenerateStreamRequest(request=ask("hi", "support")))
            await first_of(stream)
            assert (await resident(stubs, "support"))["v1"].in_use == 1
            refusal = await refused(stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="support")))
            assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_ALLOWED_NOW")
            stream.cancel()


async def test_pin(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Pinning loads and shows; unpinning shows too."""
    await publish(server, name)
    pinned = await stubs.adapters.PinAdapter(pb.PinAdapterRequest(adapter=name, pinned=True))
    assert pinned.version.version == "v1"
    assert (await resident(stubs, name))["v1"].pinned
    await stubs.adapters.PinAdapter(pb.PinAdapterRequest(adapter=name, pinned=False))
    assert not (await resident(stubs, name))["v1"].pinned


async def test_more_adapters_than_places() -> None:
    """Callers of five adapters on two places all get their own adapter's answer."""
    with fake_server(max_resident=2, max_running=4) as server:
        names = [f"adapter-{letter}" for letter in "abcde"]
        for each in names:
            await publish(server, each)
        async with stubs_to(server.target) as stubs:
            answers = await asyncio.gather(*(text(stubs, each) for _ in range(6) for each in names))
        assert answers == [f"{each}@v1 heard: hi" for each in names] * 6
        assert len(engine_of(server).loaded) <= 2 + 1  # the one that is next is loaded ahead


async def test_damaged_copy_in_the_registry(stubs: Stubs, server: FakeServer, name: str) -> None:
    """A version whose stored bytes are not what was published is DATA_LOSS, and never reaches the engine."""
    await publish(server, name)
    weights = Path(server.app.settings.registry) / "adapters" / name / "v1" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refusal = await refused(stubs.generation.Generate(ask(adapter=name)))
    assert (refusal.code, refusal.reason) == (Code.DATA_LOSS, "CORRUPT_VERSION")
    assert not await resident(stubs, name)


async def test_wrong_base_when_loaded(server: FakeServer, stubs: Stubs, folder: Path, name: str) -> None:
    """A version of another base that another server published is refused when it is asked for or promoted."""
    from dataclasses import replace

    from engine.registry.checks import Limits, check_adapter
    from engine.registry.fingerprint import read_base

    foreign = replace(read_base(server.app.settings.model), fingerprint="sha256:" + "cd" * 32)
    checked = check_adapter(folder, foreign, Limits(max_rank=8, max_bytes=10**6))
    await Registry(Store.open(server.app.settings.registry)).publish(folder, checked, name=name)
    await stubs.adapters.ListAdapters(pb.ListAdaptersRequest())
    for call in (
        stubs.generation.Generate(ask(adapter=name)),
        all_of(stubs.adapters.SetAlias(move(name, "v1", alias="canary"))),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "WRONG_BASE")
        assert "sha256:" + "cd" * 32 in refusal.message
