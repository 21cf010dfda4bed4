"""The registry as this process last saw it: names are resolved from memory, and changes are told to whoever listens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from engine.errors import AdapterNotFound, CorruptVersion, LoraplexError
from engine.registry.aliases import aliases_now, select_version
from engine.registry.canary import Canary, canary_now
from engine.registry.layout import Inventory
from engine.registry.manifest import AliasChange, Manifest
from engine.registry.names import AdapterRef, nearest
from engine.registry.reader import Reader, read_all
from engine.registry.shadow import Shadow, shadow_now
from engine.registry.subscription import AliasChanged, Deleted, Event, InEngine, Published, Subscription

_log = logging.getLogger(__name__)

Side = Literal["current", "canary"]
Trouble = tuple[str, LoraplexError]  # what follows from an error, and the error


@dataclass(frozen=True)
class AdapterView:
    """One adapter as last seen: its versions, oldest first, and its alias moves."""

    name: str
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    history: tuple[AliasChange, ...] = ()

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Which version each alias names."""
        return aliases_now(self.history)

    @cached_property
    def canary(self) -> Canary | None:
        """The canary that stands, if its version is there."""
        canary = canary_now(self.name, self.history)
        return canary if canary and canary.version in self.manifests else None

    @cached_property
    def shadow(self) -> Shadow | None:
        """The shadow that stands, if its version is there."""
        shadow = shadow_now(self.name, self.history)
        return shadow if shadow and shadow.version in self.manifests else None

    @property
    def last_move(self) -> int:
        """The number of the latest alias move; 0 if there is none."""
        return self.history[-1].sequence if self.history else 0


@dataclass(frozen=True)
class Route:
    """The version that answers (None: the base model), and its side of a canary; None if none stands or the name is not bare.

    `shadow` is set if the request is to be asked again of the version that it names.
    """

    manifest: Manifest | None
    side: Side | None = None
    shadow: Shadow | None = None


class Catalog:
    """All names, versions and aliases in memory, as of the last `refresh`."""

    def __init__(self, registry: Reader) -> None:
        self.last_error: LoraplexError | None = None
        self._registry = registry
        self._noted: set[str] = set()
        self._gaps: dict[str, int | None] = {}  # the alias move that the latest listing lacked, by adapter
        self._adapters: dict[str, AdapterView] = {}
        self._subscriptions: set[Subscription] = set()
        self._refreshing = asyncio.Lock()
        self._asked = 0  # how many refreshes were asked for, and how many of the first of them are done
        self._answered = 0
        self._suspended: dict[str, int] = {}  # by name: the move whose canary gets no requests here

    @property
    def adapters(self) -> Mapping[str, AdapterView]:
        """Every adapter, by name."""
        return self._adapters

    def resolve(self, ref: AdapterRef) -> Manifest:
        """Return the version that `ref` names; raises AdapterNotFound with the nearest names that do exist."""
        view = self.adapter(ref.name)
        return view.manifests[select_version(ref, view.manifests, view.aliases)]

    def route(self, ref: AdapterRef, key: str = "") -> Route:
        """Return the version that answers a request for `ref`: a bare name's canary takes its share of the routing keys."""
        view = self.adapter(ref.name)
        if not ref.bare:
            return Route(self.resolve(ref))
        shadow = view.shadow if view.shadow and view.shadow.draws() else None
        canary = view.canary
        if canary is None or self._suspended.get(ref.name) == canary.sequence:
            return Route(self.resolve(ref), shadow=shadow)
        if canary.takes(key):
            return Route(view.manifests[canary.version], "canary")
        return Route(self.resolve(ref), "current", shadow)

    def suspend(self, canary: Canary) -> None:
        """Send no more requests to a canary that is to end, though the log cannot be told yet."""
        self._suspended[canary.name] = canary.sequence

    def adapter(self, name: str) -> AdapterView:
        """Return one adapter; raises AdapterNotFound with the nearest names."""
        view = self._adapters.get(name)
        if view is None:
            raise AdapterNotFound(name, nearest(name, self._adapters))
        return view

    def subscribe(self) -> Subscription:
        """Listen to the changes that refreshes find from now on. Close it when done."""
        subscription = Subscription(self._subscriptions.discard)
        self._subscriptions.add(subscription)
        return subscription

    def announce(self, event: Event) -> None:
        """Tell the listeners what has happened to a version elsewhere than in the registry."""
        self._announce([event])

    async def refresh(self) -> None:
        """Read what is new in the store and announce it, each change once.

        When the store fails, everything stays as it was, `last_error` says why, and the next refresh tries again.
        Those who ask while one runs share the next: the one that runs may have missed a change they know of.
        """
        self._asked += 1
        mine = self._asked
        async with self._refreshing:
            if self._answered >= mine:
                return
            those = self._asked
            await self._refresh()
            self._answered = those

    async def _refresh(self) -> None:
        try:
            views = await self._read_all()
        except LoraplexError as error:
            self._note([("the registry cannot be read, what was known before still answers", error)])
            return
        events = _changes(self._adapters, views)
        self._adapters = views
        self._announce(events)

    async def _read_all(self) -> dict[str, AdapterView]:
        damage: list[Trouble] = []
        seen = dict.fromkeys(self._adapters, Inventory()) | await self._registry.survey()
        views = await read_all(self._read(name, seen[name], damage) for name in sorted(seen))
        if lost := [
            view.manifests[v].ref for view in views for v in view.manifests if v not in _listed(seen[view.name])
        ]:
            error = CorruptVersion(lost[0], "the registry lists it no longer, though nobody has deleted it")
            damage.append((f"what is not listed ({len(lost)} versions) stays as it was", error))
        self._note(damage)
        return {view.name: view for view in views if view.manifests}

    async def _read(self, name: str, inventory: Inventory, damage: list[Trouble]) -> AdapterView:
        """Read an adapter's new versions and moves; what is known already never changes and is not read again.

        Only its tombstone ends a version: a listing may be incomplete (storage that fails, a mount that is away).
        """
        known = self._adapters.get(name, AdapterView(name))
        gone = {f"v{number}" for number in inventory.deleted}
        manifests = {version: manifest for version, manifest in known.manifests.items() if version not in gone}
        new = _listed(inventory) - known.manifests.keys()
        for manifest in await read_all(self._manifest(name, version, damage) for version in new):
            if manifest is not None:
                manifests[manifest.version] = manifest
        present = dict(sorted(manifests.items(), key=lambda each: int(each[0].removeprefix("v"))))
        return AdapterView(name, present, await self._history(known, inventory, damage))

    async def _manifest(self, name: str, version: str, damage: list[Trouble]) -> Manifest | None:
        try:
            return await self._registry.manifest(name, version)
        except AdapterNotFound:
            return None  # deleted since it was listed
        except CorruptVersion as error:
            damage.append((f"{name}@{version} is passed over", error))
            return None

    async def _history(
        self, known: AdapterView, inventory: Inventory, damage: list[Trouble]
    ) -> tuple[AliasChange, ...]:
        """The known moves and the new ones, in order: they are numbered without gaps.

        Those after a gap wait for the next look, as the listing may have been incomplete; what is missing then is lost.
        """
        name = known.name
        new = sorted(number for number in inventory.moves if number > known.last_move)
        missing = next((want for want, number in enumerate(new, known.last_move + 1) if want != number), None)
        if missing is not None:
            error = CorruptVersion(name, f"alias move {missing} is not listed, though later ones are")
            damage.append((f"aliases of {name} may be as they were before it", error))
            if self._gaps.get(name) != missing:
                new = [number for number in new if number < missing]
        self._gaps[name] = missing
        try:
            return (*known.history, *await self._registry.moves(name, new))
        except CorruptVersion as error:
            damage.append((f"the aliases of {name} stay as they were", error))
            return known.history

    def _note(self, troubles: list[Trouble]) -> None:
        """Remember what is wrong, and log what was not wrong before: one line for an hour's outage, not a thousand."""
        for consequence, error in troubles:
            if str(error) not in self._noted:
                _log.warning("%s: %s", consequence, error)
        self._noted = {str(error) for _, error in troubles}
        self.last_error = troubles[-1][1] if troubles else None

    def _announce(self, events: list[Event]) -> None:
        for subscription in list(self._subscriptions):
            for event in events:
                subscription.push(event)


def _listed(inventory: Inventory) -> set[str]:
    return {f"v{number}" for number in inventory.published}


def _changes(before: Mapping[str, AdapterView], after: Mapping[str, AdapterView]) -> list[Event]:
    """What differs between two views: publications before the alias moves that may name them, deletions last."""
    events: list[Event] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, AdapterView(name)), after.get(name, AdapterView(name))
        events += [Published(new.manifests[version]) for version in new.manifests if version not in old.manifests]
        events += [AliasChanged(name, change) for change in new.history[len(old.history) :]]
        events += [Deleted(name, version) for version in old.manifests if version not in new.manifests]
    return events


__all__ = [
    "AdapterView",
    "AliasChanged",
    "Catalog",
    "Deleted",
    "Event",
    "InEngine",
    "Published",
    "Route",
    "Side",
    "Subscription",
]
