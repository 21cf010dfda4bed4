"""Placement and routing: agreement, balance, little movement, and the right replica for each case."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest

from engine.cluster.routing import Ask, Chooser, Costs, Rendezvous, Replica, Replicas, Report

BASE = "sha256:base"
KEYS = [f"adapter-{number}" for number in range(2000)]


def fleet(count: int, **report: object) -> Replicas:
    """So many idle replicas, r0 ... of one base."""
    made = Replicas()
    for number in range(count):
        made.add(Replica(f"r{number}", Report(**({"base": BASE, "places": 8, "slots": 4} | report))))  # type: ignore[arg-type]
    return made


def holding(*refs: str) -> dict[str, frozenset[str]]:
    """Residents, of "support@v1"."""
    names = {ref.partition("@")[0] for ref in refs}
    return {name: frozenset(ref.partition("@")[2] for ref in refs if ref.startswith(f"{name}@")) for name in names}


@pytest.mark.parametrize("count", [2, 5, 64])
def test_shares_are_even(count: int) -> None:
    """Each node comes first for its share of the keys."""
    ring = Rendezvous({f"n{number}": 1.0 for number in range(count)})
    firsts = Counter(ring.first(key)[0] for key in KEYS)
    fair = len(KEYS) / count
    assert len(firsts) == count
    assert max(firsts.values()) < fair + 5 * fair**0.5


def test_weights() -> None:
    """A node of three times the weight comes first three times as often."""
    firsts = Counter(Rendezvous({"big": 3.0, "small": 1.0}).first(key)[0] for key in KEYS)
    assert 0.7 < firsts["big"] / len(KEYS) < 0.8


@pytest.mark.parametrize("count", [2, 16, 64])
def test_a_joining_node_moves_its_share_only(count: int) -> None:
    """A join moves keys to the newcomer and between nobody else; a leave is the same backwards."""
    before = Rendezvous({f"n{number}": 1.0 for number in range(count)})
    after = Rendezvous({f"n{number}": 1.0 for number in range(count + 1)})
    moved = [key for key in KEYS if before.first(key)[0] != after.first(key)[0]]
    assert {after.first(key)[0] for key in moved} == {f"n{count}"}
    ideal = len(KEYS) / (count + 1)
    assert len(moved) < min(2 * ideal, ideal + 5 * ideal**0.5)


def test_the_order_does_not_depend_on_who_asks() -> None:
    """Routers that learned of the nodes in another order, or know another process' hash seed, agree."""
    names = [f"n{number}" for number in range(20)]
    shuffled = random.Random(1).sample(names, len(names))
    one, other = Rendezvous(dict.fromkeys(names, 1.0)), Rendezvous(dict.fromkeys(shuffled, 1.0))
    assert all(one.order(key) == other.order(key) for key in KEYS[:200])
    assert one.order("support")[:3] == ("n11", "n19", "n7")  # fixed for ever: an upgrade must not move adapters


def test_remembered_orders_do_not_keep_prompts() -> None:
    """The key of a prompt holds its beginning, and tens of thousands of orders are remembered."""
    # In a process of its own: tracemalloc crashes an interpreter in which foreign threads (of obstore) come and go.
    done = subprocess.run([sys.executable, "-c", _THOUSAND_PROMPTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000 * 500


_THOUSAND_PROMPTS = """
import tracemalloc
from engine.cluster.routing import Rendezvous

ring = Rendezvous({f"n{number}": 1.0 for number in range(4)})
tracemalloc.start()
for number in range(1000):
    assert ring.first(f"prefix {number} " + 2000 * "x") == ring.order(f"prefix {number} " + 2000 * "x")
print(tracemalloc.get_traced_memory()[0])
"""


def test_routers_agree() -> None:
    """Two routers with the same reports send the same request to the same replica."""
    routers = [Chooser(fleet(16)) for _ in range(2)]
    for key in KEYS[:200]:
        one, other = (router.choose(Ask(key), BASE) for router in routers)
        assert one
        assert other
        assert one.id == other.id


def test_affinity() -> None:
    """An idle fleet answers an adapter's requests at one place, whatever the version."""
    chooser = Chooser(fleet(8))
    assert len({chooser.choose(Ask("support", version), BASE).id for version in ("", "v1", "v2")}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(5))
def test_loads_are_bounded(seed: int) -> None:
    """However skewed the adapters, no replica gets more than the bound says."""
    pick = random.Random(seed)
    replicas = fleet(8, places=32)
    chooser = Chooser(replicas)
    for number in range(1, 400):
        adapter = f"a{min(int(pick.paretovariate(0.7)), 50)}"
        chosen = chooser.choose(Ask(adapter), BASE)
        assert chosen
        replicas.begin(chosen)
        assert chosen.active <= max(1.25 * number / 8 + 1, 16)
        assert replicas.group(BASE).active == number


def test_a_hot_adapter_is_spread() -> None:
    """One adapter that all requests are for gets as many replicas as it needs, and not all when few do."""

    def used(requests: int) -> int:
        replicas = fleet(8, places=32)
        chooser = Chooser(replicas)
        seen = set()
        for _ in range(requests):
            chosen = chooser.choose(Ask("hot"), BASE)
            assert chosen
            replicas.begin(chosen)
            seen.add(chosen.id)
            residents = holding("hot@v1")
            report = Report(BASE, 32, 4, chosen.sent, 0, residents, {"hot": chosen.sent})
            replicas.reported(chosen, report)
        return len(seen)

    assert used(10) == 1
    assert 7 <= used(200) <= 8
    assert 2 <= used(40) <= 5


def test_a_holder_is_preferred_to_a_busy_owner() -> None:
    """If the owner has a queue, whoever holds the adapter goes before others."""
    replicas = fleet(6)
    chooser = Chooser(replicas)
    owner, *others = replicas.group(BASE).ring.order(Ask("support").key)
    holder = replicas.by_id[others[2]]
    replicas.reported(holder, Report(BASE, 8, 4, residents=holding("support@v1")))
    replicas.reported(replicas.by_id[owner], Report(BASE, 8, 4, running=8, waiting=4))
    assert chooser.choose(Ask("support"), BASE) is holder


def test_a_replica_whose_slots_are_all_in_use_costs_a_turn() -> None:
    """Of two idle-enough replicas the one with a free slot is taken for an adapter that neither holds."""
    replicas = fleet(2)
    first, second = replicas.group(BASE).ring.order(Ask("new").key)
    busy = {f"x{number}": 1 for number in range(4)}
    report = Report(BASE, 8, 4, running=4, residents=holding(*(f"{name}@v1" for name in busy)), in_use=busy)
    replicas.reported(replicas.by_id[first], report)
    replicas.reported(replicas.by_id[second], Report(BASE, 8, 4, running=3))
    chosen = Chooser(replicas).choose(Ask("new", remaining_s=1.0), BASE)
    assert chosen is replicas.by_id[second]


def test_a_long_wait_is_worth_a_copy() -> None:
    """Whoever holds an adapter is waited for while that is cheaper than two loads, and no longer."""
    costs = Costs(hold_s=0.5, step_s=0.0, load_s=0.1, load_rank_s=0.0)

    def chosen(waiting: int) -> str:
        replicas = fleet(4)
        owner = replicas.group(BASE).ring.order(Ask("support").key)[0]
        for one in replicas:
            residents = holding("support@v1") if one.id == owner else {}
            replicas.reported(one, Report(BASE, 8, 4, 8, waiting if one.id == owner else 0, residents))
        best = Chooser(replicas, costs).choose(Ask("support"), BASE)
        assert best
        return "owner" if best.id == owner else "another"

    assert [chosen(waiting) for waiting in (0, 1, 3)] == ["owner", "owner", "another"]


def test_rank_counts() -> None:
    """A wide adapter costs more to load, so it goes further to find a replica that holds it."""
    costs = Costs()
    replica = Replica("r", Report(BASE))
    assert costs.adapter(replica, "a", "", 64) > costs.adapter(replica, "a", "", 8) > 0
    replica.report = Report(BASE, residents=holding("a@v1"))
    assert costs.adapter(replica, "a", "v1", 64) == 0
    assert costs.adapter(replica, "a", "v2", 64) > 0


def test_a_deadline_beats_affinity() -> None:
    """A request that its own replica would answer too late goes to the fastest one."""
    replicas = fleet(4, places=4)
    owner = replicas.group(BASE).ring.order(Ask("support").key)[0]
    replicas.reported(replicas.by_id[owner], Report(BASE, 4, 4, running=4, waiting=1, residents=holding("support@v1")))
    for other in replicas:
        if other.id != owner:
            replicas.reported(other, Report(BASE, 4, 4, running=3))
    chooser = Chooser(replicas, Costs(hold_s=4.0))
    urgent = chooser.choose(Ask("support", remaining_s=0.5), BASE)
    assert urgent
    assert urgent.id != owner


def test_prefix_affinity_of_the_base() -> None:
    """Prompts with one beginning go to one replica while it is not much busier than the next."""
    replicas = fleet(4)
    chooser = Chooser(replicas)
    first = chooser.choose(Ask(prefix="You are a helpful"), BASE)
    assert first
    assert chooser.choose(Ask(prefix="You are a helpful"), BASE) is first
    replicas.reported(first, Report(BASE, 8, 4, running=8, waiting=8))
    assert chooser.choose(Ask(prefix="You are a helpful"), BASE) is not first
    assert len({chooser.choose(Ask(prefix=key), BASE).id for key in KEYS[:50]}) == 3  # type: ignore[union-attr]


def test_who_gets_nothing() -> None:
    """Draining, distrusted, excluded replicas and those of another base get no request, and nobody is left in the end."""
    replicas = fleet(4)
    chooser = Chooser(replicas)
    replicas.reported(replicas.by_id["r0"], Report(BASE, 8, 4, draining=True))
    replicas.trust(replicas.by_id["r1"], trusted=False)
    replicas.reported(replicas.by_id["r2"], Report("sha256:other", 8, 4))
    assert {chooser.choose(Ask(key), BASE).id for key in KEYS[:50]} == {"r3"}  # type: ignore[union-attr]
    assert chooser.choose(Ask("a"), BASE, {"r3"}) is None
    assert replicas.bases() == [BASE, "sha256:other"]
    assert replicas.bases() is replicas.bases()  # every request asks, of fleets of hundreds
    replicas.remove("r3")
    assert replicas.bases() == ["sha256:other"]
    assert chooser.choose(Ask("a"), BASE) is None
    replicas.trust(replicas.by_id["r1"], trusted=True)
    assert chooser.choose(Ask("a"), BASE) is replicas.by_id["r1"]
    assert replicas.bases() == [BASE, "sha256:other"]
    replicas.reported(replicas.by_id["r1"], Report("sha256:other", 8, 4))
    assert replicas.bases() == ["sha256:other"]
    replicas.add(Replica("r9", Report("sha256:new", 8, 4)))
    assert replicas.bases() == ["sha256:other", "sha256:new"]


def test_the_sums_stay_right() -> None:
    """After any sequence of events the sums are those of a fresh look at the replicas."""
    pick = random.Random(3)
    replicas = fleet(5)
    for _ in range(500):
        replica = replicas.by_id[f"r{pick.randrange(5)}"]
        match pick.randrange(4):
            case 0:
                replicas.begin(replica)
            case 1 if replica.sent:
                replicas.end(replica)
            case 2:
                used = {f"a{pick.randrange(9)}": pick.randrange(1, 5)}
                replicas.reported(replica, Report(BASE, 8, 4, pick.randrange(9), in_use=used), pick.randrange(4))
            case _:
                replicas.trust(replica, trusted=pick.random() < 0.8)
        group = replicas.group(BASE)
        usable = [one for one in replicas if one.usable]
        assert group.active == sum(one.active for one in usable)
        totals: Counter[str] = Counter()
        for one in usable:
            totals.update(one.report.in_use)
        assert +group.in_use == totals


def test_what_ends_at_a_replica_that_has_left_is_nobody_elses() -> None:
    """Its requests end, and reports come, when it is no longer part of the sums; nor is the next one of its name."""
    replicas = fleet(2)
    left = replicas.by_id["r0"]
    for _ in range(9):
        replicas.begin(left)
    replicas.remove("r0")
    assert replicas.group(BASE).active == 0
    replicas.end(left)
    replicas.reported(left, Report(BASE, 8, 4, running=3, in_use={"support": 3}))
    assert (replicas.group(BASE).active, replicas.group(BASE).in_use.total()) == (0, 0)
    replicas.add(Replica("r0", Report(BASE, 8, 4, running=1)))
    assert replicas.group(BASE).active == 1
    for _ in range(8):
        replicas.end(left)
    assert replicas.group(BASE).active == 1
