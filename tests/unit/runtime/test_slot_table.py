"""Who gets a slot in the engine and who makes way, without an engine: the same code in a server and in a simulation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from engine.registry.worth import Rates
from engine.runtime.residency.table import Occupant, SlotTable


@dataclass(kw_only=True)
class Adapter(Occupant):
    loaded: bool = True

    @property
    def ready(self) -> bool:
        return self.loaded


class Engine:
    """Two slots, with a and b in them; a was used last, b is asked for more often."""

    def __init__(self) -> None:
        self.expected: Counter[str] = Counter()
        self.rates = Rates()
        self.slots: SlotTable[Adapter] = SlotTable(2, self.rates, self.expected)
        self.slots.held.update(a=Adapter(last_used=9.0), b=Adapter(last_used=5.0))
        for digest, times in (("a", 1), ("b", 3)):
            for _ in range(times):
                self.slots.asked(digest, 0.0)

    def find(self, *, ahead: bool = False, under_way: bool = False) -> tuple[str | None] | None:
        return self.slots.find(10.0, ahead=ahead, under_way=under_way)


@pytest.fixture
def engine() -> Engine:
    """A full one."""
    return Engine()


def test_a_free_slot_is_taken_first(engine: Engine) -> None:
    """Nobody makes way while there is room."""
    del engine.slots.held["b"]
    assert engine.find() == (None,)


def test_what_is_asked_for_least_makes_way(engine: Engine) -> None:
    """Not what was used longest ago; of equals that one does."""
    assert engine.find() == ("a",)
    for _ in range(2):
        engine.slots.asked("a", 0.0)
    assert engine.find() == ("b",)


def test_what_is_wanted_makes_way_last(engine: Engine) -> None:
    """What requests wait for goes only if there is nothing else; what is in use, pinned or being loaded never does."""
    engine.expected["a"] += 1
    assert engine.find() == ("b",)
    engine.slots.held["b"].pinned = True
    assert engine.find() == ("a",)
    engine.slots.held["a"].in_use = 1
    assert engine.find() is None
    engine.slots.held["a"] = Adapter(loaded=False)
    assert engine.find() is None
    assert not engine.slots.is_ready("a")


def test_what_is_to_go_last(engine: Engine) -> None:
    """It stays as long as anybody says so and others can go, whatever they are worth; it is never what has to stay."""
    engine.expected["b"] += 1
    with engine.slots.last("a"):
        with engine.slots.last("a"):
            assert engine.find() == ("b",)
        assert engine.find() == ("b",)
        engine.slots.held["b"].in_use = 1
        assert engine.find() == ("a",)
        engine.slots.held["ahead"] = Adapter(in_use=1)
        assert engine.find(ahead=True) is None
    assert engine.find(ahead=True) == ("a",)


def test_loading_ahead(engine: Engine) -> None:
    """It has one slot more, one load at a time, and nothing that is wanted makes way for it."""
    assert engine.find(ahead=True) == (None,)
    engine.slots.held["ahead"] = Adapter(loaded=False)
    assert engine.find(ahead=True, under_way=True) is None
    engine.slots.held["ahead"] = Adapter(in_use=1)
    engine.expected.update("ab")
    assert engine.find(ahead=True) is None
    del engine.expected["b"]
    assert engine.find(ahead=True) == ("b",)


def test_a_slot_beside_what_is_loaded_ahead(engine: Engine) -> None:
    """Whoever admission has let in finds one, though the adapter that is loaded ahead has the last of the usual slots."""
    engine.slots.held = {"a": Adapter(in_use=1), "ahead": Adapter(loaded=False)}
    assert engine.find(under_way=True) == (None,)
    assert engine.find() is None
