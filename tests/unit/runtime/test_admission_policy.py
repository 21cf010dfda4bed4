"""The policy alone, in virtual time: what it promises holds whatever arrives, leaves, is pinned or cancelled."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from engine.errors import DeadlineUnreachable, LoraplexError, Overloaded, QuotaExceeded, WaitedTooLong
from engine.runtime.admission.policy import Decision, Policy, Rules
from engine.runtime.admission.slots import Slots
from engine.runtime.admission.tenants import Tenants
from engine.runtime.admission.tickets import Asked, Ticket
from tests.unit.runtime.patience import THIRD, always, made, that_ran, third_of_two_slots
from tests.unit.runtime.simulation import ANSWER_S, STEP_S, SWITCH_S, Caller, Resident, Simulation, endless

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a simulated minute takes too long to be shrunk
PLACES, CAPACITY, PATIENCE_S = 6, 3, 2.0


class Chaos:
    """A policy, everybody it knows about, and a check of its promises after every event."""

    def __init__(self) -> None:
        self.policy = Policy(Rules(PLACES, 12, max_waiting_per_tenant=8, max_wait_s=60, max_adapter_wait_s=PATIENCE_S))
        self.resident = Resident(CAPACITY)
        self.policy.follow(self.resident)
        self.now = 0.0
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []

    def arrive(self, asked: Asked) -> None:
        """A request arrives."""
        before = self.occupied
        ticket, decided = self.policy.arrive(asked, self.now)
        self.waiting.append(ticket)
        self.take(decided, before)

    def leave(self, ticket: Ticket) -> None:
        """A request ends, or its caller gives up."""
        (self.running if ticket.running else self.waiting).remove(ticket)
        self.policy.leave(ticket, self.now)
        self.look()

    def look(self) -> None:
        """Something may have changed."""
        before = self.occupied
        self.take(self.policy.decide(self.now), before)

    def take(self, decided: list[Decision], before: set[str]) -> None:
        """Carry the decisions out, then check."""
        for ticket, error in decided:
            self.waiting.remove(ticket)
            if error is None:
                self.running.append(ticket)
                assert ticket.running
        assert sum(ticket.places for ticket in self.running) == self.policy.running <= PLACES
        assert len(self.waiting) == self.policy.waiting <= 12
        started = self.occupied - before
        assert not started or len(self.occupied) <= CAPACITY, "an adapter started without a free slot"
        self.check_that_nobody_waits_for_nothing()

    @property
    def occupied(self) -> set[str]:
        """Adapters that run, are pinned or are being loaded."""
        return {str(ticket.asked.adapter) for ticket in self.running if ticket.asked.adapter} | {*self.resident.claimed}

    def check_that_nobody_waits_for_nothing(self) -> None:
        """With a place free, whoever waits has no slot, makes room for somebody else, or is behind somebody large."""
        free = PLACES - self.policy.running
        if not free or any(ticket.places > free for ticket in self.waiting):
            return
        without_slot = [ticket for ticket in self.waiting if ticket.asked.adapter not in (None, *self.occupied)]
        over = len(self.occupied) > CAPACITY
        for ticket in self.waiting:
            if ticket in without_slot:
                assert len(self.occupied) >= CAPACITY, "a slot is free"
            else:
                assert ticket.queue.adapter.draining, "its adapter runs"
                assert without_slot or over, "it makes room for nobody"


ask = st.builds(
    Asked,
    tenant=st.sampled_from(["a", "b", "c"]),
    adapter=st.sampled_from([None, "1", "2", "3", "4", "5", "6"]),
    priority=st.sampled_from([0, 0, 0, -1, 1]),
    places=st.sampled_from([1, 1, 1, 2, PLACES, 99]),
    prompt_tokens=st.integers(0, 100),
    max_tokens=st.just(50),
)
event = st.one_of(
    st.tuples(st.just("arrive"), ask),
    st.tuples(st.just("arrive"), ask),
    st.tuples(st.just("finish"), st.integers(0, 99)),
    st.tuples(st.just("cancel"), st.integers(0, 99)),
    st.tuples(st.just("tokens"), st.integers(0, 99)),
    st.tuples(st.just("time"), st.sampled_from([0.01, 1.0, 2.5, 61.0])),
    st.tuples(st.just("claim"), st.sampled_from(["1", "2", "7", "8"])),
    st.tuples(st.just("release"), st.integers(0, 99)),
)


def happen(chaos: Chaos, kind: str, what: Any) -> None:
    """One event, if it can happen now."""
    claims = sorted(chaos.resident.claimed)
    if kind == "arrive":
        chaos.arrive(what)
    elif kind == "time":
        chaos.now += what
        chaos.look()
    elif kind == "claim" and len(claims) < CAPACITY - 1:
        chaos.resident.claimed[what] = 1
        chaos.look()
    elif kind == "release" and claims:
        del chaos.resident.claimed[claims[what % len(claims)]]
        chaos.look()
    elif kind == "tokens" and chaos.running:
        chaos.policy.served(chaos.running[what % len(chaos.running)], 10)
    elif kind in ("finish", "cancel"):
        group = chaos.running if kind == "finish" else chaos.waiting
        if group:
            chaos.leave(group[what % len(group)])


@settings(max_examples=200, deadline=None)
@given(st.lists(event, max_size=80))
def test_promises_hold_whatever_happens(events: list[tuple[str, Any]]) -> None:
    """Never too many answers or adapters, no place left empty for nothing, nobody stuck, and at the end nothing is left."""
    chaos = Chaos()
    for kind, what in events:
        happen(chaos, kind, what)
    chaos.resident.claimed.clear()
    chaos.look()
    while chaos.running or chaos.waiting:
        assert chaos.running, "they wait although nothing runs"
        chaos.leave(chaos.running[0])
    tenants, slots = chaos.policy.tenants, chaos.policy.slots
    assert not tenants._active
    assert not any(map(len, (tenants.waiting, tenants.ready, tenants.blocked, tenants.claims)))
    assert not slots._adapters
    assert not slots.running
    assert not slots.draining


def decided(policy: Policy, now: float) -> list[Ticket]:
    """Who runs now."""
    return [ticket for ticket, error in policy.decide(now) if error is None]


class Script:
    """Single events, told one by one."""

    def __init__(self, rules: Rules, capacity: int = 99) -> None:
        self.policy = Policy(rules)
        self.resident = Resident(capacity)
        self.policy.follow(self.resident)
        self.errors: dict[Ticket, LoraplexError] = {}

    def arrive(self, now: float = 0.0, **asked: Any) -> Ticket:
        """A request arrives."""
        ticket, decided = self.policy.arrive(Asked(**({"max_tokens": 50} | asked)), now)
        self.note(decided)
        return ticket

    def leave(self, *tickets: Ticket, now: float = 0.0) -> None:
        """Requests end."""
        for ticket in tickets:
            self.policy.leave(ticket, now)
            self.note(self.policy.decide(now))

    def note(self, decided: list[Decision]) -> None:
        """Keep the refusals."""
        self.errors |= {ticket: error for ticket, error in decided if error}


# Fairness


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    weights=st.tuples(st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([1.0, 2.0, 4.0])),
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    prompts=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    callers=st.tuples(st.integers(24, 40), st.integers(24, 40)),
    seed=st.integers(0, 99),
)
def test_two_backlogged_tenants_get_the_same_service(
    weights: tuple[float, float],
    lengths: tuple[int, int],
    prompts: tuple[int, int],
    callers: tuple[int, int],
    seed: int,
) -> None:
    """By weight, neither gets ahead by more than VTC's bound: twice the larger of a prompt and a whole batch's tokens."""
    random_ = random.Random(seed)
    places = 8
    names = ("p", "q")
    sim = Simulation(Rules(places, 1000, weights=dict(zip(names, weights, strict=True))), 1)
    for name, prompt, length, count in zip(names, prompts, lengths, callers, strict=True):
        asked = Asked(name, prompt_tokens=prompt, max_tokens=length)
        for _ in range(count):
            sim.call(Caller(endless(random_, lambda asked=asked: asked, 1, length)))
    batch = places * (max(prompts) + max(lengths))
    bound = 2 * max(*prompts, 2 * batch) / min(weights)
    worst = 0.0

    def measure(sim: Simulation) -> None:
        nonlocal worst
        had = dict.fromkeys(names, 0.0)
        for record in sim.records:
            if record.admitted is not None:
                had[record.asked.tenant] += record.asked.prompt_tokens
        for name in names:
            had[name] += 2 * sim.tokens[name]
        p, q = (had[name] / weight for name, weight in zip(names, weights, strict=True))
        worst = max(worst, abs(p - q))

    sim.on_step = measure
    sim.run(15)
    assert sim.tokens.total() > 0
    assert worst <= bound


def test_a_pause_saves_next_to_nothing_up() -> None:
    """Who comes back after a pause shares from now on, rather than catching up on more than four requests of what it missed."""
    random_ = random.Random(3)
    sim = Simulation(Rules(8, 1000), 1)
    for name, at in (("steady", 0.0), ("late", 60.0)):
        for _ in range(16):
            sim.call(
                Caller(endless(random_, lambda name=name: Asked(name, prompt_tokens=10, max_tokens=20), 10, 20)), at
            )
    sim.run(60)
    before = sim.tokens["steady"]
    sim.run(80)
    ahead = sim.tokens["late"] - (sim.tokens["steady"] - before)
    assert sim.tokens["late"] == pytest.approx(sim.tokens["steady"] - before, rel=0.15)
    assert ahead <= 4 * (10 / 2 + 20) + 8 * 20, "four requests, and what runs at the moment of counting"


def test_the_debt_of_who_leaves_and_returns() -> None:
    """A tenant that had more than the others does not get rid of that by a short absence."""
    script = Script(Rules(1, 100))
    greedy = script.arrive(tenant="greedy")
    waiting = [script.arrive(tenant="modest") for _ in range(3)]
    script.policy.served(greedy, 1000)
    script.leave(greedy)
    back = script.arrive(tenant="greedy")
    for ticket in waiting:
        assert ticket.running
        script.leave(ticket)
    assert back.running


def test_weights() -> None:
    """A tenant of weight 3 gets three times the tokens of one of weight 1."""
    random_ = random.Random(4)
    sim = Simulation(Rules(8, 1000, weights={"gold": 3.0}), 1)
    for name in ("gold", "plain"):
        for _ in range(16):
            sim.call(Caller(endless(random_, lambda name=name: Asked(name, prompt_tokens=10, max_tokens=20), 10, 20)))
    sim.run(60)
    assert sim.tokens["gold"] / sim.tokens["plain"] == pytest.approx(3, rel=0.1)


def test_adapters_of_a_tenant_share() -> None:
    """Within a tenant, an adapter with many callers leaves another one its half."""
    random_ = random.Random(5)
    sim = Simulation(Rules(8, 1000), 2)
    for adapter, count in (("hot", 60), ("warm", 12)):
        for _ in range(count):
            asked = Asked(adapter=adapter, prompt_tokens=10, max_tokens=20)
            sim.call(Caller(endless(random_, lambda asked=asked: asked, 10, 20)))
    sim.run(60)
    done = [record.asked.adapter for record in sim.records if record.finished]
    assert done.count("hot") / done.count("warm") == pytest.approx(1, rel=0.1)


def test_priority_orders_a_tenant_not_the_others() -> None:
    """A high priority overtakes the tenant's own requests, whatever their adapter, and not those of another tenant."""
    script = Script(Rules(1, 100))
    first = script.arrive(tenant="a")
    low = script.arrive(tenant="a", adapter="x")
    high = script.arrive(tenant="a", adapter="y", priority=100)
    other = script.arrive(tenant="b", priority=-100)
    script.policy.served(first, 100)
    order = []
    running = first
    for _ in range(3):
        script.leave(running)
        running = next(ticket for ticket in (low, high, other) if ticket.running)
        order.append(running)
    assert order == [other, high, low]


def test_a_flood_does_not_move_the_others() -> None:
    """One tenant with ten times its share of callers: the others wait for the next place at most, not behind the flood."""
    random_ = random.Random(6)
    sim = Simulation(Rules(16, 1000), 8)
    for tenant, count in (("flood", 80), ("a", 2), ("b", 2), ("c", 2)):
        for number in range(count):
            adapter = f"{tenant}-{number % 2}"
            asked = Asked(tenant, adapter, prompt_tokens=10, max_tokens=40)
            sim.call(Caller(endless(random_, lambda asked=asked: asked, 10, 40)))
    sim.run(60)
    waits = sorted(
        r.wait for r in sim.records if r.asked.tenant != "flood" and r.admitted is not None and r.arrived > 5
    )
    assert waits[int(0.95 * len(waits))] < 0.5
    assert sorted(r.wait for r in sim.records if r.asked.tenant == "flood" and r.admitted is not None)[-1] > 5


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_does_not_lengthen_a_full_engines_waits(seed: int) -> None:
    """Five tenants keep the engine just full; one asks for ten times as much: the others' p95 wait is what it was."""

    def wait_s(callers: int) -> float:
        random_ = random.Random(seed)
        sim = Simulation(Rules(32, 1000), 8)
        for tenant, count in (*((f"t{number}", 7) for number in range(4)), ("flood", callers)):
            asked = Asked(tenant, tenant, prompt_tokens=64, max_tokens=24)
            for _ in range(count):
                sim.call(Caller(endless(random_, lambda asked=asked: asked, 8, 24)), random_.random())
        sim.run(120)
        waits = sorted(
            r.wait for r in sim.records if r.asked.tenant != "flood" and r.admitted is not None and r.arrived > 20
        )
        return waits[int(0.95 * len(waits))]

    assert wait_s(70) <= 1.1 * wait_s(7)


def test_a_flood_of_adapters_does_not_either() -> None:
    """The same with slots to spare and an adapter of its own for each of the flood's requests: a start is no shortcut."""
    random_ = random.Random(6)
    sim = Simulation(Rules(16, 1000, max_adapter_wait_s=0.5), 64)
    numbers = itertools.count()
    for _ in range(80):
        flood = lambda: Asked("flood", f"flood-{next(numbers)}", prompt_tokens=10, max_tokens=40)  # noqa: E731
        sim.call(Caller(endless(random_, flood, 10, 40)))
    for tenant in "abc":
        for _ in range(2):
            asked = Asked(tenant, prompt_tokens=10, max_tokens=40)
            sim.call(Caller(endless(random_, lambda asked=asked: asked, 10, 40)))
    sim.run(60)
    waits = sorted(
        r.wait for r in sim.records if r.asked.tenant != "flood" and r.admitted is not None and r.arrived > 5
    )
    assert waits[int(0.95 * len(waits))] < 0.5


# Slots


@pytest.mark.slow
@settings(max_examples=15, deadline=None, phases=PHASES)
@given(capacity=st.integers(1, 4), hot=st.integers(1, 6), seed=st.integers(0, 99), longest=st.integers(1, 60))
def test_no_adapter_starves(capacity: int, hot: int, seed: int, longest: int) -> None:
    """However busy the others: an adapter waits its patience, a turn for each who shares the slots, and their answers."""
    random_ = random.Random(seed)
    sim = Simulation(Rules(16, 1000, max_adapter_wait_s=PATIENCE_S), capacity)
    adapters = [f"hot-{number}" for number in range(hot)]
    for number in range(24):
        asked = Asked(adapter=adapters[number % hot], max_tokens=longest)
        sim.call(Caller(endless(random_, lambda asked=asked: asked, 1, longest)))
    rare = Asked(adapter="rare", max_tokens=longest)
    sim.call(Caller(endless(random_, lambda: rare, 1, longest), pause_s=3), at=5)
    sim.run(90)
    waits = [record.wait for record in sim.records if record.asked is rare and record.admitted is not None]
    answer_s = (longest + 1) * (STEP_S + 16 * ANSWER_S + capacity * SWITCH_S)
    rounds = 1 + hot // capacity
    assert waits
    assert max(waits) <= PATIENCE_S + rounds * (PATIENCE_S + answer_s)
    assert len(waits) >= 80 / (3 + answer_s + PATIENCE_S + rounds * (PATIENCE_S + answer_s)) - 1


def test_the_third_adapter_of_two_slots() -> None:
    """It waits as long as the operator allows, and hardly costs the others anything."""
    rules = Rules(32, 256, max_adapter_wait_s=2.0)
    alone = third_of_two_slots(rules, iter(()), 60)
    together = third_of_two_slots(rules, iter([(THIRD, 24)]), 60)
    _, (third,) = that_ran(together)
    assert third.wait < 5
    assert together.tokens.total() > 0.95 * alone.tokens.total()


def test_what_a_third_adapter_costs() -> None:
    """However often it is asked: the others keep nine tenths, and it waits no more than five times as long as they."""
    alone, _ = that_ran(third_of_two_slots(Rules(32, 256), iter(()), 620))
    busy, third = that_ran(third_of_two_slots(Rules(32, 256), always(), 620))
    waits = sorted(record.wait for record in busy)
    assert len(third) > 40
    assert max(record.wait for record in third) < 5 * waits[int(0.99 * len(waits))]
    assert made(busy) > 0.9 * made(alone)


@pytest.mark.parametrize(
    ("answer_s", "slots", "patience_s"),
    [(0.0, 2, 2.0), (0.2, 2, 1.0), (1.0, 2, 5.0), (5.0, 2, 10.0), (1.0, 8, 1.25), (1.0, 64, 1.0), (0.01, 2, 0.5)],
)
def test_patience_follows_the_answers(answer_s: float, slots: int, patience_s: float) -> None:
    """Ten answers divided by the slots, one at least, half a second at least; two seconds as long as nothing is known."""
    claims = Slots(10.0)
    claims.residents = Resident(slots)
    claims.learn(answer_s)
    adapter = claims.adapter("a")
    queue = Tenants({}).arriving("t", 0.0).queue(adapter)
    queue.add(Ticket(Asked("t", "a"), queue, 1, 1, 100.0))
    adapter.waiting = 1
    assert not claims.urgent(queue, 100.0 + patience_s - 0.01)
    assert claims.urgent(queue, 100.0 + patience_s + 0.01)


def test_a_switch_is_paid_by_a_batch() -> None:
    """With twice as many busy adapters as slots, each keeps its slot for a turn: far more requests than loads."""
    random_ = random.Random(7)
    sim = Simulation(Rules(16, 1000), 4)
    for number in range(48):
        asked = Asked(adapter=f"adapter-{number % 8}", max_tokens=30)
        sim.call(Caller(endless(random_, lambda asked=asked: asked, 10, 30)))
    sim.run(60)
    finished = sum(record.finished is not None for record in sim.records)
    assert finished > 5 * sim.resident.loads
    assert max(record.wait for record in sim.records if record.admitted is not None) < 20


def test_larger_batch_first() -> None:
    """Of two adapters that have waited as long, the one with more requests gets the slot; of equal ones, the resident."""
    script = Script(Rules(8, 100), capacity=1)
    running = script.arrive(adapter="x")
    single = script.arrive(1.0, adapter="one")
    batch = [script.arrive(1.01, adapter="many") for _ in range(3)]
    script.leave(running, now=1.1)
    assert [ticket.running for ticket in batch] == [True] * 3
    assert single.waiting
    script.resident.use("here", [])
    cold, here = script.arrive(1.2, adapter="cold"), script.arrive(1.21, adapter="here")
    script.leave(*batch, now=1.3)
    script.leave(single, now=1.4)
    assert here.running
    assert cold.waiting


def test_an_older_claim_beats_a_larger_one() -> None:
    """A batch is worth some waiting, not any amount of it: who has waited longest by far goes first."""
    script = Script(Rules(100, 100), capacity=1)
    running = script.arrive(adapter="x")
    old = script.arrive(0.5, adapter="old")
    for _ in range(50):
        script.arrive(3.0, adapter="many")
    script.leave(running, now=3.1)
    assert old.running


def test_draining_ends_when_nobody_needs_the_slot() -> None:
    """If the one who waits gives up, the adapter that was making room goes on, and whoever waits for it is let in."""
    script = Script(Rules(8, 100), capacity=1)
    running = script.arrive(adapter="busy")
    urgent = script.arrive(1.0, adapter="urgent")
    held_back = script.arrive(4.0, adapter="busy")
    assert held_back.waiting
    script.leave(urgent, now=4.1)
    assert held_back.running
    script.leave(running, held_back, now=5.0)


def test_a_turn_is_not_cut_short() -> None:
    """An adapter that has just started is not drained, however long another one has waited."""
    script = Script(Rules(8, 100), capacity=1)
    first = script.arrive(0.0, adapter="a")
    waits = script.arrive(0.1, adapter="b")
    script.arrive(0.2, adapter="c")
    script.leave(first, now=5.0)
    assert waits.running
    assert script.arrive(6.0, adapter="b").running, "its turn began at 5"
    assert script.arrive(7.1, adapter="b").waiting, "its turn is over and c has waited"


def test_the_base_needs_no_slot() -> None:
    """Requests for the base run whatever the adapters do."""
    script = Script(Rules(8, 100), capacity=1)
    script.arrive(adapter="a")
    assert script.arrive(adapter="b").waiting
    assert script.arrive(adapter=None).running


def test_pins_take_slots_away() -> None:
    """A pinned adapter keeps its slot even when idle; its own requests need none besides."""
    script = Script(Rules(8, 100), capacity=2)
    script.resident.claimed["pinned"] = 1
    assert script.arrive(adapter="a").running
    other = script.arrive(adapter="b")
    assert other.waiting
    assert script.arrive(adapter="pinned").running
    del script.resident.claimed["pinned"]
    script.note(script.policy.decide(0.1))
    assert other.waiting, "requests still run on what was pinned"


def test_a_promotion_gets_its_slot() -> None:
    """While a load outside of admission wants a slot and all are busy, one adapter takes no more requests."""
    script = Script(Rules(8, 100), capacity=2)
    a, b = script.arrive(adapter="a"), script.arrive(adapter="b")
    script.resident.claimed["new"] = 1
    more = [script.arrive(3.0, adapter=name) for name in "ab"]
    assert sorted(ticket.running for ticket in more) == [False, True]
    held_back = next(ticket for ticket in more if ticket.waiting)
    script.resident.claimed.clear()
    script.note(script.policy.decide(3.1))
    assert held_back.running
    script.leave(a, b, *more, now=4.0)


def test_slots_are_shared_among_tenants() -> None:
    """A tenant that asks for many adapters takes turns among them, and leaves another one the adapter it lives on."""
    random_ = random.Random(8)
    sim = Simulation(Rules(16, 1000), 4)
    numbers = itertools.count()
    greedy = lambda: Asked("greedy", f"greedy-{next(numbers) % 40}", max_tokens=20)  # noqa: E731
    for _ in range(40):
        sim.call(Caller(endless(random_, greedy, 10, 20)))
    for tenant in ("a", "b"):
        asked = Asked(tenant, tenant, max_tokens=20)
        sim.call(Caller(endless(random_, lambda asked=asked: asked, 10, 20), pause_s=0.0))
    sim.run(60)
    waits = sorted(
        r.wait for r in sim.records if r.asked.tenant != "greedy" and r.admitted is not None and r.arrived > 5
    )
    assert waits[int(0.95 * len(waits))] < 1
    assert sum(record.finished is not None for record in sim.records if record.asked.tenant == "greedy") > 200


def test_a_tenant_with_its_share_takes_turns_among_its_own() -> None:
    """However long its other adapter has waited, the slot is not taken from who has no more slots than it has."""
    script = Script(Rules(8, 100), capacity=2)
    modest = [script.arrive(0.0, tenant="modest", adapter="m", max_tokens=10)]
    before = script.arrive(0.0, tenant="greedy", adapter="g0")
    first = script.arrive(0.1, tenant="greedy", adapter="g1")
    script.arrive(0.2, tenant="greedy", adapter="g2")
    script.leave(before, now=1.5)
    assert first.running
    modest.append(script.arrive(3.0, tenant="modest", adapter="m", max_tokens=10))
    assert modest[-1].running, "g2 is urgent, but of greedy's own g1 the turn is not over"
    assert script.arrive(3.6, tenant="greedy", adapter="g1").waiting, "now it is"
    modest.append(script.arrive(3.7, tenant="modest", adapter="m", max_tokens=10))
    assert modest[-1].running


def test_what_is_promoted_is_not_drained() -> None:
    """An adapter that makes room and is then pinned or promoted stays anyway, so its requests go on."""
    script = Script(Rules(8, 100), capacity=2)
    for name in "ab":
        script.arrive(adapter=name)
    script.arrive(0.1, adapter="urgent")
    held_back = [ticket for ticket in (script.arrive(3.0, adapter=name) for name in "ab") if ticket.waiting]
    assert len(held_back) == 1
    script.resident.claimed[str(held_back[0].asked.adapter)] = 1
    script.note(script.policy.decide(3.1))
    assert held_back[0].running
    assert [script.arrive(3.2, adapter=name).running for name in "ab"].count(True) == 1, "now the other one makes room"


def test_a_tenant_of_little_weight_gets_a_slot_too() -> None:
    """Who has none takes a slot from who has most, whatever the weights."""
    script = Script(Rules(8, 100, weights={"poor": 0.001}), capacity=2)
    first = [script.arrive(tenant="rich", adapter=name) for name in "ab"]
    poor = script.arrive(0.1, tenant="poor", adapter="p")
    more = [script.arrive(3.0, tenant="rich", adapter=name) for name in "ab"]
    assert sum(ticket.waiting for ticket in more) == 1
    drained = next(ticket.asked.adapter for ticket in more if ticket.waiting)
    script.leave(*(ticket for ticket in first if ticket.asked.adapter == drained), now=3.1)
    assert poor.running


# Limits


def test_a_tenants_own_limit() -> None:
    """One more than a tenant may have waiting is its own quota, and nobody else's business."""
    script = Script(Rules(1, 100, max_waiting_per_tenant=2))
    script.arrive(tenant="a")
    kept = [script.arrive(tenant="a") for _ in range(2)]
    refused = script.arrive(tenant="a")
    error = script.errors[refused]
    assert isinstance(error, QuotaExceeded)
    assert error.tenant == "a"
    assert error.retry_after_s >= 1
    assert script.arrive(tenant="b").waiting
    assert all(ticket.waiting for ticket in kept)


def test_a_full_queue_makes_room_for_who_has_less_of_it() -> None:
    """When one tenant fills the queue, another one's request takes the place of the flood's last and least urgent."""
    script = Script(Rules(1, 4))
    script.arrive(tenant="flood")
    flood = [
        script.arrive(tenant="flood", adapter=name, priority=priority)
        for name, priority in zip("abcd", (0, -1, 0, 0), strict=True)
    ]
    assert script.arrive(tenant="quiet").waiting
    assert [isinstance(script.errors.get(ticket), QuotaExceeded) for ticket in flood] == [False, True, False, False]
    assert script.arrive(tenant="quiet").waiting
    assert isinstance(script.errors[flood[3]], QuotaExceeded)
    late = script.arrive(tenant="quiet")
    assert isinstance(script.errors[late], Overloaded)
    assert isinstance(script.errors[script.arrive(tenant="flood")], Overloaded)


@pytest.mark.parametrize(
    ("rules", "kind"),
    [({"max_wait_s": 10.0}, WaitedTooLong), ({"max_wait_s": 10.0, "max_wait_per_tenant_s": 5.0}, QuotaExceeded)],
)
def test_nobody_waits_longer_than_the_limit(rules: dict[str, float], kind: type[LoraplexError]) -> None:
    """Past the age limit a waiting request is refused, and `due` says when to look."""
    script = Script(Rules(1, 100, **rules))
    script.arrive(0.0)
    waits = script.arrive(1.0)
    due = script.policy.due()
    assert due == 1.0 + min(rules.values())
    script.note(script.policy.decide(due - 0.01))
    assert not script.errors
    script.note(script.policy.decide(due))
    assert isinstance(script.errors[waits], kind)
    assert script.policy.waiting == 0


def trained(places: int = 4) -> Script:
    """A policy that has seen requests hold their places for ten seconds and produce fifty tokens."""
    script = Script(Rules(places, 1000))
    for number in range(10):
        ticket = script.arrive(10.0 * number, tenant="past")
        script.policy.served(ticket, 50)
        script.leave(ticket, now=10.0 * number + 10)
    return script


def test_a_deadline_that_cannot_be_met() -> None:
    """Who cannot be answered in time is told when it arrives, not when it is too late; who would start at once may try."""
    script = trained()
    assert script.arrive(200.0, deadline=201.0).running
    for _ in range(3):
        script.arrive(200.0)
    assert script.arrive(200.0, deadline=213.0).waiting
    refused = script.arrive(200.0, deadline=212.0)
    error = script.errors[refused]
    assert isinstance(error, DeadlineUnreachable)
    assert error.retry_after_s >= 1
    short = script.arrive(200.0, deadline=212.0, max_tokens=10)
    assert short.waiting, "ten tokens take two seconds"


def test_a_deadline_that_has_become_too_close() -> None:
    """Whose turn comes too late for its deadline is not started any more."""
    script = trained(places=1)
    running = script.arrive(200.0)
    late, other = script.arrive(200.0, deadline=221.0), script.arrive(200.0)
    assert late.waiting
    script.leave(running, now=212.0)
    assert isinstance(script.errors[late], DeadlineUnreachable)
    assert other.running


def goodput(load: float) -> float:
    """Requests a second that are answered in time, with `load` times what the engine can do offered."""
    random_ = random.Random(9)
    sim = Simulation(Rules(16, 256), 8)
    at = 0.0
    while at < 90:
        at += random_.expovariate(load * 7.0)
        asked = Asked(prompt_tokens=10, max_tokens=60, deadline=at + 6)
        sim.send(at, asked, random_.randint(10, 60))
    sim.run(90)
    return (
        sum(r.finished is not None and r.admitted is not None and r.finished <= r.asked.deadline for r in sim.records)
        / 90
    )


def test_goodput_stays_flat_under_overload() -> None:
    """At two and at five times what the engine can do, nearly as many are answered in time as at its best."""
    best = max(goodput(0.8), goodput(1.0))
    assert goodput(2.0) > 0.9 * best
    assert goodput(5.0) > 0.9 * best


def test_idle_tenants_are_forgotten_in_the_end() -> None:
    """Callers who invent names cannot fill the memory."""
    script = Script(Rules(1, 10))
    for number in range(1200):
        script.leave(script.arrive(tenant=f"tenant-{number}"))
    assert len(script.policy.tenants._idle) <= 1024
    assert not script.policy.tenants._active
