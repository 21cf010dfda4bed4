"""Which copy should make way? Policies compared on made-up traces: how much loading is left to do, of what LRU leaves.

A trace is requests in time, one every tenth of a second, for adapters of four sizes. A miss costs what was measured for a
load (docs/residency.md): a constant and a part by size. No engine, no clock: the same numbers on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from engine.registry.worth import HALF_LIFE_S, Rates
from loadtest.bench import output

ADAPTERS, REQUESTS, PAUSE_S = 1000, 40_000, 0.1
SIZES = (1.0, 2.0, 4.0, 8.0)  # MB: ranks 8 to 64 on q and v of a small base
FIXED_S, PER_MB_S = 0.012, 0.0015
Trace = Iterator[int]


@dataclass
class Entry:
    """A copy that a cache holds."""

    size: float
    cost: float
    used: float
    worth: float = 0.0


class Cache:
    """Room for copies; `key` says whose goes first: least of (number, entry, now)."""

    def __init__(self, room: float, key: Callable[[Cache, int, Entry, float], float]) -> None:
        self.room = room
        self.key = key
        self.held: dict[int, Entry] = {}
        self.counts: dict[int, int] = {}
        self.rates = Rates()
        self.floor = 0.0  # GDSF's clock: the worth of the last victim
        self._full = 0.0

    def ask(self, number: int, size: float, cost: float, now: float) -> float:
        """A request; returns what loading for it cost."""
        self.rates.asked(str(number), now)
        entry = self.held.get(number)
        self.counts[number] = self.counts.get(number, 0) + 1 if entry else 1
        missed = entry is None
        if entry is None:
            while self._full + size > self.room:
                self._evict(now)
            entry = self.held[number] = Entry(size, cost, now)
            self._full += size
        entry.used = now
        entry.worth = self.floor + self.counts[number] * cost / size
        return cost if missed else 0.0

    def _evict(self, now: float) -> None:
        victim = min(self.held, key=lambda number: self.key(self, number, self.held[number], now))
        entry = self.held.pop(victim)
        self.floor = max(self.floor, entry.worth)
        self._full -= entry.size


POLICIES: dict[str, Callable[[Cache, int, Entry, float], float]] = {
    "LRU": lambda _cache, _number, entry, _now: entry.used,
    "GDSF": lambda _cache, _number, entry, _now: entry.worth,
    "rate x cost / size": lambda cache, number, entry, now: cache.rates.worth(
        str(number), now, cost=entry.cost, size=entry.size
    ),
}


def zipf(rng: random.Random) -> Trace:
    """Always the same favourites."""
    weights = [1 / rank for rank in range(1, ADAPTERS + 1)]
    yield from rng.choices(range(ADAPTERS), weights, k=REQUESTS)


def drift(rng: random.Random) -> Trace:
    """Every ten minutes each adapter takes over the popularity of the one twenty places before it."""
    for at, number in enumerate(zipf(rng)):
        yield (number + 20 * int(at * PAUSE_S / 600)) % ADAPTERS


def visits(rng: random.Random) -> Trace:
    """Favourites, and every five minutes a minute in which each request is for another adapter."""
    for at, number in enumerate(zipf(rng)):
        yield number if at * PAUSE_S % 300 < 240 else rng.randrange(ADAPTERS)


def fresh(rng: random.Random) -> Trace:
    """Adapters come in, are everybody's for a while, and are forgotten: another favourite every minute."""
    for at, number in enumerate(zipf(rng)):
        yield (number + int(at * PAUSE_S / 60)) % ADAPTERS


TRACES: dict[str, Callable[[random.Random], Trace]] = {"zipf": zipf, "drift": drift, "visits": visits, "fresh": fresh}
TIERS = {"8 slots": (8.0, False), "memory for 6 %": (225.0, True)}


def measure(seeds: int) -> list[dict[str, Any]]:
    """Share of requests that found their adapter, and loading time as a share of LRU's, for every case."""
    rows = []
    for tier, (room, sized) in TIERS.items():
        for trace in TRACES:
            spent = {policy: [_one(policy, trace, room, sized, seed) for seed in range(seeds)] for policy in POLICIES}
            lru = sum(cost for cost, _ in spent["LRU"])
            for policy, found in spent.items():
                hits = sum(hit for _, hit in found) / seeds
                cost = sum(cost for cost, _ in found) / lru
                rows.append({"tier": tier, "trace": trace, "policy": policy, "hits": hits, "loading": cost})
    return rows


def _one(policy: str, trace: str, room: float, sized: bool, seed: int) -> tuple[float, float]:
    cache = Cache(room, POLICIES[policy])
    sizes = random.Random(0).choices(SIZES, k=ADAPTERS)
    spent, hits = 0.0, 0
    for at, number in enumerate(TRACES[trace](random.Random(seed))):
        cost = cache.ask(number, sizes[number] if sized else 1.0, FIXED_S + PER_MB_S * sizes[number], at * PAUSE_S)
        spent += cost
        hits += not cost
    return spent, hits / REQUESTS


def eviction(
    seeds: Annotated[int, typer.Option(min=1, help="Traces of each kind.")] = 3,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """Which adapter should make way: LRU, GDSF and ours on traces that stay, drift, and are swept by strangers.

    Examples:
      make bench ARGS="eviction"        about a minute, no engine
      make bench ARGS="eviction --seeds 10 --json"

    hits is the share of requests that found their adapter, loading the time
    spent on loads as a share of what LRU needs. eviction.json goes into the
    report's folder.
    """
    rows = measure(seeds)
    path = output.save({"half_life_s": HALF_LIFE_S, "rows": rows}, report / "eviction.json")
    if as_json:
        output.write_json(rows)
    else:
        made = Table(title=f"Eviction, {REQUESTS} requests for {ADAPTERS} adapters", title_justify="left", box=None)
        for heading in ("tier", "trace", "policy", "hits", "loading"):
            made.add_column(heading, justify="left" if heading in ("tier", "trace", "policy") else "right")
        for row in rows:
            made.add_row(row["tier"], row["trace"], row["policy"], f"{row['hits']:.3f}", f"{row['loading']:.2f}")
        output.show([made])
    output.note(f"written: {path}")
