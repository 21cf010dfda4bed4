"""Who gets the canary: the share that was asked for, each key always the same, and whatever moves an alias ends it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from engine.errors import AdapterNotFound, InvalidRequest, NotAllowedNow
from engine.registry.canary import Canary, canary_now
from engine.registry.catalog import Catalog
from engine.registry.layout import alias_file
from engine.registry.manifest import decode_change
from engine.registry.names import AdapterRef
from engine.registry.registry import Registry
from engine.registry.store import Store

Make = Callable[..., tuple]

KEYS = [f"user-{number}" for number in range(4000)]
BARE = AdapterRef.parse("support")


@pytest.fixture
async def published(registry: Registry, make_checked: Make) -> Registry:
    """A registry with support@v1, which is current, v2 and v3."""
    for seed in range(3):
        folder, checked = make_checked(seed)
        await registry.publish(folder, checked, name="support")
    return registry


async def standing(registry: Registry) -> Canary | None:
    """The canary that the log says stands."""
    return canary_now("support", await registry.history("support"))


@pytest.mark.parametrize("version", ["v2", "v17"])
def test_keys_are_shared_out_by_weight(version: str) -> None:
    """Of many keys the canary gets its share, within five standard deviations of a fair draw; 0 is none and 1 is all."""
    for weight in (0.0, 0.01, 0.05, 0.3, 0.5, 0.97, 1.0):
        taken = sum(Canary("support", version, weight).takes(key) for key in KEYS)
        expected = weight * len(KEYS)
        assert abs(taken - expected) <= 5 * math.sqrt(expected * (1 - weight))


def test_a_greater_weight_only_adds_keys() -> None:
    """Raising the weight takes no key away from the canary, and asking again changes nothing."""
    before: set[str] = set()
    for step in range(0, 101, 5):
        canary = Canary("support", "v2", step / 100)
        taken = {key for key in KEYS if canary.takes(key)}
        assert taken == {key for key in KEYS if canary.takes(key)}
        assert before <= taken
        before = taken
    assert before == set(KEYS)


def test_the_next_canary_is_tried_on_other_keys() -> None:
    """Two canaries of a tenth share about a hundredth of the keys, whether of one adapter or of two."""
    first = {key for key in KEYS if Canary("support", "v2", 0.1).takes(key)}
    for other in (Canary("support", "v3", 0.1), Canary("legal", "v2", 0.1)):
        both = sum(other.takes(key) for key in first)
        assert both < 0.2 * len(first)


def test_without_a_key_each_request_is_drawn() -> None:
    """No key is no key of its own: both sides answer."""
    canary = Canary("support", "v2", 0.5)
    assert {canary.takes("") for _ in range(200)} == {True, False}


async def test_only_bare_names_are_shared_out(published: Registry) -> None:
    """The bare name is split; "@current", "@canary" and "@v3" get what they name."""
    await published.set_canary("support", "v2", 1.0)
    catalog = Catalog(published)
    await catalog.refresh()
    assert catalog.route(BARE, "key").manifest.version == "v2"
    assert (catalog.route(BARE).side, catalog.route(AdapterRef.parse("support@v2")).side) == ("canary", None)
    assert catalog.resolve(BARE).version == "v1"  # to promote, pin or load "support" is about what is current
    for ref, version in (("current", "v1"), ("canary", "v2"), ("v3", "v3"), ("v1", "v1")):
        assert catalog.route(AdapterRef.parse(f"support@{ref}"), "key").manifest.version == version


async def test_every_server_decides_alike(published: Registry, store: Store) -> None:
    """Two catalogs over one store send each key to the same version."""
    await published.set_canary("support", "v2", 0.4)
    ours, theirs = Catalog(published), Catalog(Registry(store))
    await asyncio.gather(ours.refresh(), theirs.refresh())
    sides = [catalog.route(BARE, key).manifest.version for key in KEYS[:300] for catalog in (ours, theirs)]
    assert sides[::2] == sides[1::2]
    assert set(sides) == {"v1", "v2"}


async def test_version_and_weight_change_in_one_move(published: Registry) -> None:
    """Starting, changing and ending are one entry of the log each, with who and why."""
    await published.set_canary("support", "v2", 0.05, actor="ann", reason="try")
    await published.set_canary("support", "v3", 0.5, actor="bob", reason="better")
    assert await standing(published) == Canary("support", "v3", 0.5)
    await published.end_canary("support", actor="eve")
    assert await standing(published) is None
    assert await published.aliases("support") == {"canary": "v3", "current": "v1"}
    moves = [(m.version, m.split and m.split.weight, m.actor, m.reason) for m in await published.history("support")][1:]
    assert moves == [("v2", 0.05, "ann", "try"), ("v3", 0.5, "bob", "better"), ("v3", None, "eve", "canary ended")]


@pytest.mark.parametrize("mover", ["promote the canary", "promote another", "move canary", "remove", "other alias"])
async def test_moving_an_alias_ends_the_canary(published: Registry, mover: str) -> None:
    """A promotion, and so its rollback, leaves no traffic on a canary; another alias has nothing to do with it."""
    await published.set_canary("support", "v2", 0.5)
    match mover:
        case "promote the canary":
            await published.set_alias("support", "current", "v2")
        case "promote another":
            await published.set_alias("support", "current", "v3")
        case "move canary":
            await published.set_alias("support", "canary", "v3")
        case "remove":
            await published.remove_alias("support", "canary")
        case _:
            await published.set_alias("support", "stable", "v1")
    assert (await standing(published) is not None) == (mover == "other alias")
    if mover == "promote the canary":
        await published.set_alias("support", "current", await published.rollback_target("support", "current"))
        assert await standing(published) is None


@pytest.mark.parametrize("weight", [-0.01, 1.01, math.inf, -math.inf, math.nan])
async def test_a_weight_that_is_no_share_is_refused(published: Registry, weight: float) -> None:
    """The canary that stood still stands."""
    await published.set_canary("support", "v2", 0.5)
    with pytest.raises(InvalidRequest, match="0 to 1"):
        await published.set_canary("support", "v3", weight)
    assert await standing(published) == Canary("support", "v2", 0.5)


async def test_what_cannot_be_a_canary(published: Registry) -> None:
    """The current version, a version that is not there, and ending what does not stand are refused."""
    with pytest.raises(NotAllowedNow, match="current version"):
        await published.set_canary("support", "v1", 0.5)
    with pytest.raises(AdapterNotFound):
        await published.set_canary("support", "v9", 0.5)
    with pytest.raises(NotAllowedNow, match="no canary"):
        await published.end_canary("support")
    assert len(await published.history("support")) == 1


async def test_a_version_on_trial_cannot_be_deleted(published: Registry) -> None:
    """Whichever comes first, deletion or canary, no share of requests goes to a version that is gone."""
    await published.set_canary("support", "v2", 0.5)
    with pytest.raises(NotAllowedNow):
        await published.delete_version("support", "v2")
    await asyncio.gather(
        published.set_canary("support", "v3", 0.5), published.delete_version("support", "v3"), return_exceptions=True
    )
    catalog = Catalog(published)
    await catalog.refresh()
    assert {catalog.route(BARE, key).manifest.version for key in KEYS[:50]} <= set(
        catalog.adapters["support"].manifests
    )


async def test_a_damaged_weight_is_not_obeyed(published: Registry, store: Store) -> None:
    """An entry with an impossible weight leaves the aliases as they were, and the catalog says why."""
    catalog = Catalog(published)
    await published.set_canary("support", "v2", 0.5)
    await catalog.refresh()
    change = await published.set_canary("support", "v3", 0.25)
    path = alias_file("support", change.sequence)
    await store.delete([path])
    await store.create(path, change.encode().replace(b"0.25", b"25.0"))
    await catalog.refresh()
    assert catalog.adapters["support"].canary == Canary("support", "v2", 0.5)
    assert catalog.last_error is not None


def test_entries_of_earlier_servers_have_no_split() -> None:
    """A log that was written before there were canaries reads as it did."""
    old = b'{"sequence": 1, "alias": "canary", "version": "v2", "created_at": "2026-01-01T00:00:00Z"}'
    assert canary_now("support", [decode_change(old, "support", 1)]) is None
