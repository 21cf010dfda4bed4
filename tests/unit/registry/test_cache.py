"""Local copies are whole, verified and shared."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import CorruptVersion, RegistryUnavailable
from engine.registry.cache import LocalCopies
from engine.registry.layout import version_file
from engine.registry.manifest import Manifest
from engine.registry.registry import Registry
from engine.registry.store import Store

Make = Callable[..., tuple]
WEIGHTS = "adapter_model.safetensors"


class CountingRegistry(Registry):
    """Counts downloads."""

    fetched = 0

    async def fetch(self, manifest: Manifest, target: Path) -> None:
        self.fetched += 1
        await asyncio.sleep(0.01)
        await super().fetch(manifest, target)


@pytest.fixture
def registry(store: Store) -> CountingRegistry:
    """A registry that counts downloads."""
    return CountingRegistry(store)


@pytest.fixture
async def manifest(registry: CountingRegistry, make_checked: Make) -> Manifest:
    """A published version."""
    folder, checked = make_checked()
    return await registry.publish(folder, checked, name="support")


async def test_callers_share_one_download(registry: CountingRegistry, manifest: Manifest, tmp_path: Path) -> None:
    """Many callers at once get the same whole folder from one download, even if one of them gives up."""
    copies = LocalCopies(tmp_path / "cache", registry)
    impatient = asyncio.create_task(copies.get(manifest))
    await asyncio.sleep(0)
    impatient.cancel()
    found = await asyncio.gather(*(copies.get(manifest) for _ in range(10)))
    assert len(set(found)) == registry.fetched == 1
    assert found[0].is_absolute()
    assert {path.name for path in found[0].iterdir()} == {file.path for file in manifest.files}
    assert found[0].name == manifest.digest.removeprefix("sha256:")


async def test_so_many_downloads_at_once(
    registry: CountingRegistry, make_checked: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait, except for copies that are there already."""
    monkeypatch.setattr("engine.registry.cache._DOWNLOADS", 2)
    versions = [await registry.publish(*make_checked(seed), name="support") for seed in range(4)]
    copies, there = LocalCopies(tmp_path / "cache", registry), LocalCopies(tmp_path / "cache", registry)
    await there.get(versions[3])
    going = asyncio.Event()
    fetch = registry.fetch

    async def hang(manifest: Manifest, target: Path) -> None:
        registry.fetched += 1
        await going.wait()
        await fetch(manifest, target)

    monkeypatch.setattr(registry, "fetch", hang)
    registry.fetched = 0
    getting = [asyncio.create_task(copies.get(version)) for version in versions[:3]]
    async with asyncio.timeout(5):
        await copies.get(versions[3])
        while registry.fetched < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert registry.fetched == 2
        going.set()
        assert len(set(await asyncio.gather(*getting))) == 3


@pytest.mark.parametrize("damage", ["changed", "missing", "extra"])
async def test_a_damaged_copy_is_replaced(
    registry: CountingRegistry, manifest: Manifest, tmp_path: Path, damage: str
) -> None:
    """A new process checks an old copy before it trusts it."""
    folder = await LocalCopies(tmp_path / "cache", registry).get(manifest)
    whole = (folder / WEIGHTS).read_bytes()
    if damage == "changed":
        (folder / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "missing":
        (folder / WEIGHTS).unlink()
    else:
        (folder / "extra.bin").write_bytes(b"x")
    again = LocalCopies(tmp_path / "cache", registry)
    assert await again.get(manifest) == folder
    assert (folder / WEIGHTS).read_bytes() == whole
    assert not (folder / "extra.bin").exists()
    assert registry.fetched == 2
    await LocalCopies(tmp_path / "cache", registry).get(manifest)
    assert registry.fetched == 2


async def test_removed_copies_are_downloaded_again(
    registry: CountingRegistry, manifest: Manifest, tmp_path: Path
) -> None:
    """Removing frees the disk, twice is fine, and the next caller gets a new copy."""
    copies = LocalCopies(tmp_path / "cache", registry)
    folder = await copies.get(manifest)
    await copies.remove(manifest.digest)
    await copies.remove(manifest.digest)
    assert list((tmp_path / "cache").iterdir()) == []
    assert await copies.get(manifest) == folder
    assert registry.fetched == 2


async def test_corrupt_versions_leave_no_copy(
    registry: CountingRegistry, manifest: Manifest, store: Store, tmp_path: Path
) -> None:
    """A download that does not verify leaves nothing, and the next try starts afresh."""
    path = version_file("support", "v1", WEIGHTS)
    data = await store.get(path)
    await store.delete([path])
    copies = LocalCopies(tmp_path / "cache", registry)
    with pytest.raises(CorruptVersion):
        await copies.get(manifest)
    assert list((tmp_path / "cache").iterdir()) == []
    await store.create(path, data)
    assert (await copies.get(manifest)).is_dir()


async def test_a_full_disk_is_unavailable(
    registry: CountingRegistry, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the copy is said so, and leaves nothing behind."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    copies = LocalCopies(tmp_path / "cache", registry)
    monkeypatch.setattr("engine.registry.store._append", full)
    with pytest.raises(RegistryUnavailable, match="disk full") as caught:
        await copies.get(manifest)
    assert str(tmp_path) not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


async def test_leftovers_are_swept(registry: CountingRegistry, tmp_path: Path) -> None:
    """What a crashed process left is deleted at the start; another process's download is left alone."""
    cache = tmp_path / "cache"
    for name in (f".tmp-{os.getpid()}-a", ".tmp-999999999-b", f".tmp-{os.getppid()}-c", "a" * 64):
        (cache / name).mkdir(parents=True)
    LocalCopies(cache, registry)
    assert sorted(path.name for path in cache.iterdir()) == [f".tmp-{os.getppid()}-c", "a" * 64]
