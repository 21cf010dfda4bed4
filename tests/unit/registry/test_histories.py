"""Random histories of clients that publish, promote and delete at once, checked against what one after the other could give.

After the way etcd is tested (https://etcd.io/blog/2020/jepsen-343-results): every client writes down what it did, when it
began and ended, and what came of it; then there must be an order in which all of that is true.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from engine.errors import AdapterNotFound, AliasMoved, LoraplexError, NotAllowedNow
from engine.registry.manifest import AliasChange
from engine.registry.registry import Registry
from engine.registry.store import Store

CLIENTS, STEPS, NAME = 8, 12, "support"
ALIASES = ("current", "stable")


@dataclass
class Act:
    """What a client did to an alias between two ticks of a clock that all share."""

    actor: str
    alias: str
    version: str
    expected: str | None
    began: int
    ended: int = 0
    change: AliasChange | None = None
    refused: LoraplexError | None = None


@dataclass
class Run:
    """Clients of one store."""

    adapters: list[tuple]
    dice: random.Random
    clock: Iterator[int] = field(default_factory=itertools.count)
    acts: list[Act] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    async def client(self, number: int, registry: Registry) -> None:
        """Do this and that."""
        for step in range(STEPS):
            kind = self.dice.choices(("publish", "move", "delete"), (1, 6, 1))[0]
            if kind == "publish" or not self.published:
                folder, checked = self.dice.choice(self.adapters)
                self.published.append((await registry.publish(folder, checked, name=NAME)).version)
            elif kind == "move":
                await self.move(registry, f"{number}.{step}")
            else:
                await self.delete(registry)

    async def move(self, registry: Registry, actor: str) -> None:
        """Point an alias somewhere, often only if it is where it was last seen."""
        alias, version = self.dice.choice(ALIASES), self.dice.choice(self.published)
        expected = (await registry.aliases(NAME)).get(alias, "") if self.dice.random() < 0.7 else None
        act = Act(actor, alias, version, expected, next(self.clock))
        with self.written_down(act):
            act.change = await registry.set_alias(NAME, alias, version, actor=actor, expected=expected)

    @contextmanager
    def written_down(self, act: Act) -> Iterator[None]:
        """Its end, good or bad."""
        try:
            yield
        except (AliasMoved, AdapterNotFound) as error:
            act.refused = error
        act.ended = next(self.clock)
        self.acts.append(act)

    async def delete(self, registry: Registry) -> None:
        """Withdraw a version that no alias names."""
        version = self.dice.choice(self.published)
        try:
            await registry.delete_version(NAME, version)
        except (NotAllowedNow, AdapterNotFound):
            return
        self.deleted.append(version)


@pytest.mark.parametrize("seed", range(20))
async def test_there_is_an_order(seed: int, make_checked: Callable[..., tuple]) -> None:
    """Whatever the clients did at once, the log tells an order of it in which nobody was lied to."""
    store = Store.open("memory://")
    run = Run([make_checked(number) for number in range(5)], random.Random(seed))
    await asyncio.gather(*(run.client(number, Registry(store)) for number in range(CLIENTS)))
    registry = Registry(store)
    history = await registry.history(NAME)
    assert [change.sequence for change in history] == list(range(1, len(history) + 1))
    for act in run.acts:
        check(act, run.acts, history)
    versions = {manifest.version for manifest in await registry.manifests(NAME)}
    assert not versions & set(run.deleted)
    assert set((await registry.aliases(NAME)).values()) <= versions
    assert versions | set(run.deleted) == set(run.published)


def check(act: Act, acts: list[Act], history: list[AliasChange]) -> None:
    """Its own entries are there, at a time when it was under way, and it was told the truth."""
    own = [change for change in history if change.actor == act.actor]
    after = max((other.change.sequence for other in acts if other.change and other.ended < act.began), default=0)
    before = min(
        (other.change.sequence for other in acts if other.change and other.began > act.ended), default=len(history) + 1
    )
    assert all(after < change.sequence < before for change in own)
    if act.change:
        assert own == [act.change]
        assert (act.change.alias, act.change.version) == (act.alias, act.version)
        assert act.expected in (None, value(history, act.alias, act.change.sequence - 1))
    elif isinstance(act.refused, AliasMoved):
        assert not own
        assert any(value(history, act.alias, at) != act.expected for at in range(after, before))
    else:  # the version was deleted: before the move, or after, and then it was taken back, unless somebody had moved it on
        assert len(own) <= 2


def value(history: list[AliasChange], alias: str, at: int) -> str:
    """What the alias named after so many moves."""
    return next((change.version or "" for change in reversed(history[:at]) if change.alias == alias), "")
