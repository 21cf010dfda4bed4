"""Versions never change, aliases are a log, and no fault or race leaves anything half done."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from engine.errors import (
    AdapterNotFound,
    AliasMoved,
    CorruptVersion,
    InvalidAdapter,
    InvalidRequest,
    NotAllowedNow,
    RegistryUnavailable,
    VersionExists,
)
from engine.registry.catalog import Catalog
from engine.registry.layout import CLAIM, MANIFEST, tombstone_file, version_file
from engine.registry.manifest import version_digest
from engine.registry.names import AdapterRef
from engine.registry.registry import Registry
from engine.registry.store import Store

Make = Callable[..., tuple]


async def publish(registry: Registry, make_checked: Make, seed: int = 0, name: str = "support", **more: object):
    """Publish the adapter of this seed."""
    folder, checked = make_checked(seed)
    return await registry.publish(folder, checked, name=name, **more)


async def state(registry: Registry, name: str = "support") -> tuple:
    """Everything that callers can see of an adapter, after checking that it is consistent."""
    manifests = await registry.manifests(name)
    for manifest in manifests:
        with tempfile.TemporaryDirectory() as target:
            await registry.fetch(manifest, Path(target))
    aliases = await registry.aliases(name)
    versions = [manifest.version for manifest in manifests]
    assert set(aliases.values()) <= set(versions)
    return versions, [manifest.digest for manifest in manifests], aliases


async def test_publish_and_resolve(registry: Registry, make_checked: Make) -> None:
    """The first version is what a bare name means; later ones change nothing until they are promoted."""
    seen: list[tuple[str, float]] = []
    first = await publish(registry, make_checked, publisher="ann", notes="hi", progress=lambda *step: seen.append(step))
    second = await publish(registry, make_checked, 1)
    assert (first.ref, second.ref) == ("support@v1", "support@v2")
    assert first.digest == version_digest(first.files)
    assert await registry.list_names() == ["support"]
    assert await registry.resolve(AdapterRef.parse("support")) == first
    assert await registry.resolve(AdapterRef.parse("support@v2")) == second
    assert seen[-1] == ("storing", 1.0)


async def test_versions_are_in_numeric_order(registry: Registry, make_checked: Make) -> None:
    """v10 comes after v9."""
    for seed, version in enumerate(["v10", "v9", "v2"]):
        await publish(registry, make_checked, seed, version=version)
    assert await registry.versions("support") == ["v2", "v9", "v10"]
    assert (await publish(registry, make_checked, 5)).version == "v11"


async def test_not_found_names_the_nearest(registry: Registry, make_checked: Make) -> None:
    """A wrong name, version or alias is told what does exist."""
    await publish(registry, make_checked)
    for text, nearest in [("suport", "support"), ("support@v11", "support@v1"), ("support@curent", "support@current")]:
        with pytest.raises(AdapterNotFound) as caught:
            await registry.resolve(AdapterRef.parse(text))
        assert caught.value.nearest == [nearest]


async def test_versions_are_immutable(registry: Registry, make_checked: Make) -> None:
    """The same files under a version again are fine, other files are refused."""
    first = await publish(registry, make_checked, version="v1")
    assert await publish(registry, make_checked, version="v1") == first
    with pytest.raises(VersionExists):
        await publish(registry, make_checked, 1, version="v1")
    assert (await state(registry))[:2] == (["v1"], [first.digest])


async def test_promote_and_roll_back(registry: Registry, make_checked: Make) -> None:
    """Every move is kept, and the version before can be found again."""
    for seed in range(3):
        await publish(registry, make_checked, seed)
    with pytest.raises(NotAllowedNow):
        await registry.rollback_target("support", "current")
    await registry.set_alias("support", "current", "v2", actor="ann", reason="better")
    await registry.set_alias("support", "current", "v3")
    assert await registry.rollback_target("support", "current") == "v2"
    await registry.delete_version("support", "v2")
    assert await registry.rollback_target("support", "current") == "v1"
    history = await registry.history("support")
    assert [(change.sequence, change.version) for change in history] == [(1, "v1"), (2, "v2"), (3, "v3")]
    assert (history[1].actor, history[1].reason) == ("ann", "better")


async def test_the_order_of_moves_is_not_that_of_clocks(
    registry: Registry, make_checked: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers whose clocks are days apart move one alias: the last move counts, and a rollback goes to the one before."""
    for seed in range(3):
        await publish(registry, make_checked, seed)
    for version, days in (("v2", 3), ("v3", -3)):
        now = datetime.now(UTC) + timedelta(days=days)
        monkeypatch.setattr("engine.registry.registry.datetime", SimpleNamespace(now=lambda _, now=now: now))
        await registry.set_alias("support", "current", version)
    assert (await registry.aliases("support"))["current"] == "v3"
    assert await registry.rollback_target("support", "current") == "v2"
    catalog = Catalog(registry)
    await catalog.refresh()
    assert catalog.adapters["support"].aliases["current"] == "v3"


async def test_aliases_are_set_and_removed(registry: Registry, make_checked: Make) -> None:
    """An alias can go, but not current, and not one that is not there."""
    await publish(registry, make_checked)
    await registry.set_alias("support", "canary", "v1")
    assert (await registry.remove_alias("support", "canary")).version is None
    assert await registry.aliases("support") == {"current": "v1"}
    with pytest.raises(AdapterNotFound):
        await registry.remove_alias("support", "canary")
    with pytest.raises(AdapterNotFound):
        await registry.rollback_target("support", "canary")
    with pytest.raises(NotAllowedNow):
        await registry.remove_alias("support", "current")
    with pytest.raises(AdapterNotFound):
        await registry.set_alias("support", "canary", "v7")
    with pytest.raises(InvalidRequest):
        await registry.set_alias("support", "v7", "v1")


async def test_deleted_numbers_are_never_used_again(registry: Registry, make_checked: Make) -> None:
    """A deleted version is gone for good, and so is its number."""
    for seed in range(2):
        await publish(registry, make_checked, seed)
    with pytest.raises(NotAllowedNow, match="support@current"):
        await registry.delete_version("support", "v1")
    await registry.delete_version("support", "v2")
    assert await registry.versions("support") == ["v1"]
    with pytest.raises(AdapterNotFound):
        await registry.delete_version("support", "v2")
    with pytest.raises(AdapterNotFound):
        await registry.set_alias("support", "canary", "v2")
    with pytest.raises(NotAllowedNow):
        await publish(registry, make_checked, 1, version="v2")
    assert (await publish(registry, make_checked, 3)).version == "v3"


async def test_a_damaged_version_can_be_deleted(registry: Registry, store: Store, make_checked: Make) -> None:
    """It goes for good, files and all, though its manifest cannot be read; not while an alias names it."""
    for seed in range(2):
        await publish(registry, make_checked, seed)
    for version in ("v1", "v2"):
        path = version_file("support", version, MANIFEST)
        await store.delete([path])
        await store.create(path, b"{}")
    with pytest.raises(NotAllowedNow, match="support@current"):
        await registry.delete_version("support", "v1")
    await registry.delete_version("support", "v2")
    assert await registry.versions("support") == ["v1"]
    assert [path for path in await store.list("adapters/support/v2") if not path.endswith(".claim")] == []
    with pytest.raises(AdapterNotFound):
        await registry.delete_version("support", "v2")


@pytest.mark.parametrize("evaluation", [220, 300, 2000, "\ud800"])
async def test_what_could_not_be_read_again_is_refused(
    registry: Registry, store: Store, make_checked: Make, evaluation: int | str
) -> None:
    """Such a manifest is not written, and no number is taken for it."""
    value: Any = evaluation
    for _ in range(evaluation if isinstance(evaluation, int) else 0):
        value = {"a": value}
    with pytest.raises(InvalidRequest, match="evaluation_json"):
        await publish(registry, make_checked, evaluation={"a": value})
    with pytest.raises(InvalidRequest, match="Unicode"):
        await publish(registry, make_checked, notes="\ud800")
    assert await store.list("adapters") == []


async def test_racing_publishers_get_versions_of_their_own(registry: Registry, make_checked: Make) -> None:
    """Twenty at once get twenty versions, each with its own files, and one of them is current."""
    made = [make_checked(seed) for seed in range(20)]
    found = await asyncio.gather(*(registry.publish(folder, checked, name="support") for folder, checked in made))
    assert sorted(manifest.number for manifest in found) == list(range(1, 21))
    versions, digests, aliases = await state(registry)
    assert len(versions) == len(set(digests)) == 20
    assert {manifest.version: manifest.digest for manifest in found} == dict(zip(versions, digests, strict=True))
    assert list(aliases) == ["current"]
    assert len(await registry.history("support")) == 1


async def test_one_publisher_wins_a_version(registry: Registry, make_checked: Make) -> None:
    """Eight at once for one number: one gets it, seven are told, and the files are the winner's."""
    made = [make_checked(seed) for seed in range(8)]
    found = await asyncio.gather(
        *(registry.publish(folder, checked, name="support", version="v5") for folder, checked in made),
        return_exceptions=True,
    )
    winners = [result for result in found if not isinstance(result, BaseException)]
    assert len(winners) == 1
    assert sum(isinstance(result, VersionExists) for result in found) == 7
    assert await state(registry) == (["v5"], [winners[0].digest], {"current": "v5"})


async def test_one_mover_wins_an_expected_alias(registry: Registry, make_checked: Make) -> None:
    """Two that both expect v1: one moves the alias, the other is told."""
    for seed in range(3):
        await publish(registry, make_checked, seed)
    found = await asyncio.gather(
        *(registry.set_alias("support", "current", to, expected="v1") for to in ("v2", "v3")), return_exceptions=True
    )
    assert [type(result) for result in found].count(AliasMoved) == 1
    assert len(await registry.history("support")) == 2


async def test_racing_moves_are_all_kept(registry: Registry, make_checked: Make) -> None:
    """Without expectation every mover succeeds, in some order, without a gap."""
    await publish(registry, make_checked)
    await asyncio.gather(*(registry.set_alias("support", f"a{n}", "v1") for n in range(10)))
    assert [change.sequence for change in await registry.history("support")] == list(range(1, 12))


async def test_no_alias_names_a_version_deleted_meanwhile(registry: Registry, make_checked: Make) -> None:
    """Whoever wins the race between promotion and deletion, no alias is left dangling."""
    for seed in range(6):
        await publish(registry, make_checked, seed)
    for version in ("v2", "v3", "v4", "v5", "v6"):
        await asyncio.gather(
            registry.set_alias("support", "current", version),
            registry.delete_version("support", version),
            return_exceptions=True,
        )
        await state(registry)


class Crash(Exception):
    """The process is gone."""


class CrashingStore(Store):
    """Carries out `writes` writes and deletions, then none at all."""

    writes = 10**9

    async def create(self, path: str, data: bytes) -> None:
        self._spend()
        await super().create(path, data)

    async def delete(self, paths) -> None:
        for path in paths:
            self._spend()
            await super().delete([path])

    def _spend(self) -> None:
        if self.writes <= 0:
            raise Crash
        self.writes -= 1


@pytest.mark.parametrize("first", [True, False])
async def test_a_crash_between_any_two_writes_leaves_old_or_new(store: Store, make_checked: Make, first: bool) -> None:
    """Publishing is all or nothing, wherever the process dies, and the next publication works."""
    healthy = Registry(store)
    if not first:
        await publish(healthy, make_checked, 99)
    for writes in range(10):
        before = await state(healthy)
        crashing = CrashingStore(store._backend)
        crashing.writes = writes
        try:
            published = await publish(Registry(crashing), make_checked, writes)
        except Crash:
            published = None
        versions, _, aliases = await state(healthy)
        if published is not None:
            assert versions == [*before[0], published.version]
            break
        assert versions[: len(before[0])] == before[0]
        assert len(versions) - len(before[0]) in (0, 1)
        if before[2]:
            assert aliases == before[2]
            assert versions == before[0]
    assert published is not None
    assert (await healthy.resolve(AdapterRef.parse("support"))).version in versions


async def test_a_crash_while_deleting_leaves_old_or_gone(store: Store, make_checked: Make) -> None:
    """Deleting is all or nothing for whoever looks."""
    healthy = Registry(store)
    await publish(healthy, make_checked)
    for writes in range(5):
        version = (await publish(healthy, make_checked, writes + 1)).version
        crashing = CrashingStore(store._backend)
        crashing.writes = writes
        try:
            await Registry(crashing).delete_version("support", version)
        except Crash:
            assert writes < 4
        assert (version in (await state(healthy))[0]) == (writes == 0)


class BlindStore(Store):
    """Writes a tombstone, and then waits and cannot be listed `times` times."""

    def __init__(self, backend, times: int = 1) -> None:
        super().__init__(backend)
        self.times = times
        self.buried, self.go_on = asyncio.Event(), asyncio.Event()
        self.go_on.set()

    async def create(self, path: str, data: bytes) -> None:
        await super().create(path, data)
        if "/deleted/" in path:
            self.buried.set()

    async def list(self, prefix: str) -> list[str]:
        if self.buried.is_set():
            await self.go_on.wait()
            self.times -= 1
            if self.times >= 0:
                raise RegistryUnavailable(f"listing {prefix}", "not reachable")
        return await super().list(prefix)


async def test_a_failed_deletion_changes_nothing(store: Store, make_checked: Make) -> None:
    """An alias may have moved to the version meanwhile, and must not name one that is gone; deleting again works."""
    healthy = Registry(store)
    for seed in range(2):
        await publish(healthy, make_checked, seed)
    before = await state(healthy)
    with pytest.raises(RegistryUnavailable):
        await Registry(BlindStore(store._backend)).delete_version("support", "v2")
    assert await state(healthy) == before
    await healthy.delete_version("support", "v2")
    assert (await state(healthy))[0] == ["v1"]


async def test_a_deletion_whose_caller_leaves(store: Store, make_checked: Make) -> None:
    """It goes on to its end."""
    healthy = Registry(store)
    for seed in range(2):
        await publish(healthy, make_checked, seed)
    slow = BlindStore(store._backend, times=0)
    slow.go_on.clear()
    deletion = asyncio.create_task(Registry(slow).delete_version("support", "v2"))
    await slow.buried.wait()
    deletion.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deletion
    slow.go_on.set()
    async with asyncio.timeout(10):
        while len(await store.list("adapters/support/v2")) > 1:
            await asyncio.sleep(0.01)
    assert (await state(healthy))[0] == ["v1"]


async def test_a_deletion_that_was_cut_off_is_finished(store: Store, make_checked: Make) -> None:
    """Deleting once more deletes the files that are left, not while an alias names the version; then it is not there."""
    healthy = Registry(store)
    for seed in range(2):
        await publish(healthy, make_checked, seed)
    for version in ("v1", "v2"):
        await store.create(tombstone_file("support", version), b"{}")
    with pytest.raises(NotAllowedNow, match="support@current"):
        await healthy.delete_version("support", "v1")
    await healthy.delete_version("support", "v2")
    assert await store.list("adapters/support/v2") == [version_file("support", "v2", CLAIM)]
    with pytest.raises(AdapterNotFound):
        await healthy.delete_version("support", "v2")


class FailingStore(Store):
    """Refuses write number `failing` and carries out all others."""

    failing = 0

    async def create(self, path: str, data: bytes) -> None:
        self.failing -= 1
        if self.failing == 0:
            raise RegistryUnavailable(f"writing {path}", "disk full")
        await super().create(path, data)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
async def test_a_failed_publication_leaves_nothing(store: Store, make_checked: Make, failing: int) -> None:
    """When a write fails the files written so far are deleted again and the registry is as before."""
    healthy = Registry(store)
    await publish(healthy, make_checked)
    before = await state(healthy)
    store_failing = FailingStore(store._backend)
    store_failing.failing = failing
    with pytest.raises(RegistryUnavailable, match="disk full"):
        await publish(Registry(store_failing), make_checked, 1)
    assert await state(healthy) == before
    assert [path for path in await store.list("adapters/support/v2") if not path.endswith(".claim")] == []


class SlowStore(Store):
    """Stops before a chosen write until the test goes on."""

    def __init__(self, backend, ending: str) -> None:
        super().__init__(backend)
        self.ending = ending
        self.reached = asyncio.Event()

    async def create(self, path: str, data: bytes) -> None:
        if path.endswith(self.ending):
            self.reached.set()
            await asyncio.sleep(60)
        await super().create(path, data)


@pytest.mark.parametrize("ending", ["adapter_model.safetensors", MANIFEST])
async def test_a_cancelled_publication_leaves_nothing(store: Store, make_checked: Make, ending: str) -> None:
    """A caller that hangs up in the middle leaves the registry as it was."""
    slow = SlowStore(store._backend, ending)
    task = asyncio.create_task(publish(Registry(slow), make_checked))
    await slow.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    healthy = Registry(store)
    assert await state(healthy) == ([], [], {})
    assert await healthy.list_names() == []
    assert [path for path in await store.list("adapters/support/v1") if not path.endswith(".claim")] == []


class LostAnswerStore(Store):
    """Writes the manifest and then says that it failed, as a broken connection does."""

    async def create(self, path: str, data: bytes) -> None:
        await super().create(path, data)
        if path.endswith(MANIFEST):
            raise RegistryUnavailable(f"writing {path}", "not reachable")


async def test_a_manifest_whose_answer_was_lost_is_published(store: Store, make_checked: Make) -> None:
    """The version is there, so the publisher is told so, and its files are not deleted."""
    manifest = await publish(Registry(LostAnswerStore(store._backend)), make_checked)
    assert (await state(Registry(store)))[1] == [manifest.digest]


async def test_a_folder_that_changes_while_published_is_refused(registry: Registry, make_checked: Make) -> None:
    """What was checked is what is published."""
    folder, checked = make_checked()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidAdapter, match="changed"):
        await registry.publish(folder, checked, name="support")
    assert await registry.list_names() == []


@pytest.mark.parametrize("how", ["flipped", "missing", "longer", "manifest"])
async def test_corruption_is_detected(registry: Registry, store: Store, make_checked: Make, tmp_path, how: str) -> None:
    """Stored bytes that are not what was published are never handed out."""
    manifest = await publish(registry, make_checked)
    name = MANIFEST if how == "manifest" else "adapter_model.safetensors"
    path = version_file("support", "v1", name)
    data = await store.get(path)
    await store.delete([path])
    if how != "missing":
        await store.create(path, data + b"x" if how == "longer" else data[:-1] + bytes([data[-1] ^ 1]))
    target = tmp_path / "fetched"
    target.mkdir()
    with pytest.raises(CorruptVersion, match="support@v1"):
        await (registry.manifest("support", "v1") if how == "manifest" else registry.fetch(manifest, target))


async def test_fetch_copies_every_file(registry: Registry, make_checked: Make, tmp_path: Path) -> None:
    """What comes back is what was published, and nothing else."""
    folder, checked = make_checked()
    manifest = await registry.publish(folder, checked, name="support")
    target = tmp_path / "fetched"
    target.mkdir()
    await registry.fetch(manifest, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        await registry.fetch(manifest, target)


@pytest.mark.parametrize(
    ("code", "reason"), [(28, "disk full"), (30, "read-only"), (13, "permission denied"), (5, "not reachable")]
)
async def test_storage_failures_are_unavailable(
    registry: Registry, make_checked: Make, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    """Whatever the storage says, callers hear a short reason without local paths, and nothing changed."""
    await publish(registry, make_checked)
    before = await state(registry)

    async def refuse(*_: object, **__: object) -> None:
        raise GenericError(f"Generic LocalFileSystem error: Unable to copy /srv/secret: {os.strerror(code)}")

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put_async", refuse)
        for attempt in (
            publish(registry, make_checked, 1),
            registry.set_alias("support", "canary", "v1"),
            registry.set_alias("support", "current", "v1"),
        ):
            with pytest.raises(RegistryUnavailable, match=reason) as caught:
                await attempt
            assert "secret" not in str(caught.value)
    assert await state(registry) == before


def set_mode(mode: int, *paths: str | Path) -> None:
    """Change who may write."""
    for path in paths:
        Path(path).chmod(mode)


async def test_a_read_only_folder_is_unavailable(make_checked: Make) -> None:
    """A real folder that refuses writes is told as such; a folder that cannot be made, too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = Path(parent, "registry")
        registry = Registry(Store.open(folder))
        made = make_checked()
        user = os.geteuid()
        set_mode(0o555, parent, folder)
        try:
            if user == 0:
                os.seteuid(65534)  # root may write anywhere
            with pytest.raises(RegistryUnavailable, match="permission denied"):
                await registry.publish(*made, name="support")
            with pytest.raises(RegistryUnavailable, match="permission denied"):
                Store.open(Path(parent, "other"))
        finally:
            os.seteuid(user)
            set_mode(0o755, parent)
        assert await registry.list_names() == []


async def test_a_vanished_folder_is_not_an_empty_registry(tmp_path: Path) -> None:
    """An unmounted registry is unavailable: nobody deleted all its adapters."""
    registry = Registry(Store.open(tmp_path / "registry"))
    assert await registry.list_names() == []
    (tmp_path / "registry").rmdir()
    with pytest.raises(RegistryUnavailable):
        await registry.list_names()


async def test_a_vanished_folder_is_no_damaged_version(tmp_path: Path, make_checked: Make) -> None:
    """Whatever is read of an unmounted registry is unavailable, not deleted and not damaged; then it is there again."""
    registry, target = Registry(Store.open(tmp_path / "registry")), tmp_path / "target"
    manifest = await publish(registry, make_checked)
    target.mkdir()
    (tmp_path / "registry").rename(tmp_path / "away")
    for read in (registry.fetch(manifest, target), registry.manifest("support", "v1")):
        with pytest.raises(RegistryUnavailable):
            await read
    (tmp_path / "away").rename(tmp_path / "registry")
    await registry.fetch(manifest, target)
    assert await registry.manifest("support", "v1") == manifest


async def test_a_folder_that_goes_in_the_middle(
    tmp_path: Path, make_checked: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing or a write that the registry's folder did not outlast is no result: half of a walk says nothing."""
    home, away = tmp_path / "registry", tmp_path / "away"
    registry = Registry(Store.open(home))
    await publish(registry, make_checked)
    plainly = {name: getattr(obstore, name) for name in ("list", "put_async")}

    def moved_before(name: str) -> None:
        def call(*given: Any, **named: Any) -> Any:
            home.rename(away)
            return plainly[name](*given, **named)

        monkeypatch.setattr(obstore, name, call)

    moved_before("list")
    with pytest.raises(RegistryUnavailable):
        await registry.list_names()
    away.rename(home)
    monkeypatch.undo()
    moved_before("put_async")
    with pytest.raises(RegistryUnavailable):
        await registry.set_alias("support", "canary", "v1")
    monkeypatch.undo()
    shutil.rmtree(home)  # the write has made one
    away.rename(home)
    assert await registry.aliases("support") == {"current": "v1"}


async def test_a_bare_mount_point_is_no_empty_registry(tmp_path: Path, make_checked: Make) -> None:
    """Where something was there is nothing: neither is that a registry without adapters, nor a place to publish to."""
    home = tmp_path / "registry"
    registry = Registry(Store.open(home))
    await publish(registry, make_checked)
    home.rename(tmp_path / "away")
    home.mkdir()
    with pytest.raises(RegistryUnavailable):
        await registry.list_names()
    with pytest.raises(RegistryUnavailable):
        await publish(registry, make_checked, 1)
    assert not [*home.iterdir()]


async def test_what_was_missing_for_a_moment(store: Store, make_checked: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that was away for one read and is back has lost nothing."""
    registry = Registry(store)
    manifest = await publish(registry, make_checked)
    plainly, asked = obstore.get_async, []

    async def get(backend: Any, path: str) -> Any:
        asked.append(path)
        if asked.count(path) == 1:
            raise FileNotFoundError(path)
        return await plainly(backend, path)

    monkeypatch.setattr(obstore, "get_async", get)
    assert await registry.manifest("support", "v1") == manifest


async def test_foreign_objects_are_passed_over(registry: Registry, store: Store, make_checked: Make) -> None:
    """Files that are not the registry's own do no harm, a copy under a name that none may have included."""
    manifest = await publish(registry, make_checked)
    for path in ("adapters/README.md", "adapters/support/x/y", "adapters/support/v0/manifest.json", "adapters/n/v1/x"):
        await store.create(path, b"x")
    for path in await store.list("adapters/support"):
        await store.create(path.replace("support", "Support backup"), await store.get(path))
    await store.create("adapters/Support backup/deleted/v2.json", b"{}")
    catalog = Catalog(registry)
    await catalog.refresh()
    assert catalog.last_error is None
    assert list(catalog.adapters) == ["support"]
    assert catalog.resolve(AdapterRef.parse("support")) == manifest
    assert await registry.list_names() == ["support"]
    assert await registry.versions("support") == ["v1"]
    assert await registry.versions("n") == []


async def test_stores_open_by_folder_and_file_url(tmp_path: Path) -> None:
    """A folder's path and its file:// URL are the same store."""
    await Store.open(tmp_path / "r").create("a/b/c", b"1")
    store = Store.open(f"file://{tmp_path}/r")
    assert await store.get("a/b/c") == b"1"
    assert await store.list("a") == ["a/b/c"]
