"""Admission: who goes next, who is turned away, and that no place is ever lost."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from typing import Any

import pytest

from engine.errors import Draining, LoraplexError, Overloaded, QuotaExceeded, WaitedTooLong
from engine.runtime.admission import Admission, Asked, Rules


def gate(max_running: int, max_waiting: int, **rules: Any) -> Admission:
    """Admission with these limits."""
    return Admission(Rules(max_running, max_waiting, **rules))


class Crowd:
    """Requests that hold a place until they are let go, and write down in which order they got it."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.go: dict[str, asyncio.Event] = {}

    async def add(self, name: str, priority: int = 0, places: int = 1, **asked: Any) -> asyncio.Task[None]:
        """A request arrives."""
        self.go[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, Asked(priority=priority, places=places, **asked)))
        await self.settle()
        return self.tasks[name]

    async def release(self, *names: str) -> None:
        """Requests finish."""
        for name in names:
            self.go[name].set()
        await self.settle()

    async def settle(self) -> None:
        """Let everyone go as far as they can."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def _hold(self, name: str, asked: Asked) -> None:
        async with self.admission.place(asked):
            self.order.append(name)
            await self.go[name].wait()


async def test_first_come_first_served() -> None:
    """Equal priorities go in order of arrival."""
    crowd = Crowd(gate(1, 10))
    for name in "abc":
        await crowd.add(name)
    await crowd.release("a", "b", "c")
    assert crowd.order == ["a", "b", "c"]


async def test_priority_goes_first() -> None:
    """A higher priority overtakes who waits, and equal ones keep their order."""
    crowd = Crowd(gate(1, 10))
    await crowd.add("running")
    for name, priority in (("low", -5), ("normal", 0), ("high", 5), ("high too", 5)):
        await crowd.add(name, priority)
    await crowd.release(*crowd.go)
    assert crowd.order == ["running", "high", "high too", "normal", "low"]


async def test_full_queue() -> None:
    """Past the bound one is told at once, with how many wait."""
    admission = gate(1, 2)
    crowd = Crowd(admission)
    for name in "abc":
        await crowd.add(name)
    assert (admission.running, admission.waiting) == (1, 2)
    with pytest.raises(Overloaded, match="2 requests are waiting") as refusal:
        await (await crowd.add("d"))
    assert refusal.value.retry_after_s > 0
    await crowd.release("a")
    await crowd.add("e")
    await crowd.release("b", "c", "e")
    assert crowd.order == ["a", "b", "c", "e"]


async def test_no_queue_at_all() -> None:
    """max_waiting 0: run at once or be refused."""
    crowd = Crowd(gate(1, 0))
    await crowd.add("a")
    with pytest.raises(Overloaded):
        await (await crowd.add("b"))
    await crowd.release("a")


async def test_leaving_the_queue() -> None:
    """Who is cancelled while waiting gives the place in the queue back."""
    admission = gate(1, 1)
    crowd = Crowd(admission)
    await crowd.add("a")
    waiting = await crowd.add("b")
    waiting.cancel()
    await crowd.settle()
    assert admission.waiting == 0
    await crowd.add("c")
    await crowd.release("a", "c")
    assert crowd.order == ["a", "c"]
    assert admission.running == 0


async def test_cancelled_in_the_instant_of_admission() -> None:
    """A place that is handed to somebody who has just been cancelled goes to the next."""
    admission = gate(1, 5)
    crowd = Crowd(admission)
    await crowd.add("a")
    unlucky = await crowd.add("b")
    await crowd.add("c")
    crowd.go["a"].set()
    while admission.waiting == 2:
        await asyncio.sleep(0)
    unlucky.cancel()
    await crowd.settle()
    assert crowd.order == ["a", "c"]
    await crowd.release("c")
    assert admission.running == 0


async def test_several_places() -> None:
    """A request for n answers takes n places, and a small one behind it does not overtake it for ever."""
    admission = gate(4, 10)
    crowd = Crowd(admission)
    await crowd.add("two", places=2)
    await crowd.add("three", places=3)
    await crowd.add("one", places=1)
    assert crowd.order == ["two"]
    await crowd.release("two")
    assert crowd.order == ["two", "three", "one"]
    assert admission.running == 4
    await crowd.release("three", "one")
    assert admission.running == 0


async def test_more_places_than_there_are() -> None:
    """A request for more places than there are takes them all, rather than waiting for ever."""
    admission = gate(2, 10)
    crowd = Crowd(admission)
    await crowd.add("sixteen", places=16)
    assert admission.running == 2
    await crowd.release("sixteen")
    assert admission.running == 0


async def test_draining() -> None:
    """After drain new ones are refused, and who runs or waits already goes on."""
    admission = gate(1, 5)
    crowd = Crowd(admission)
    await crowd.add("a")
    await crowd.add("b")
    admission.drain()
    with pytest.raises(Draining):
        await (await crowd.add("c"))
    idle = asyncio.create_task(admission.until_idle())
    await crowd.release("a")
    assert not idle.done()
    await crowd.release("b")
    assert idle.done()
    assert crowd.order == ["a", "b"]


async def test_idle_from_the_start() -> None:
    """Nothing runs, nothing to wait for."""
    await asyncio.wait_for(gate(1, 1).until_idle(), 1)


async def test_idle_when_the_last_waiter_leaves() -> None:
    """Idle is noticed when the last one finishes although somebody who waited had left."""
    admission = gate(1, 5)
    crowd = Crowd(admission)
    await crowd.add("a")
    (await crowd.add("b")).cancel()
    await crowd.release("a")
    await asyncio.wait_for(admission.until_idle(), 1)


async def test_error_inside_gives_the_place_back() -> None:
    """A request that fails gives its places back."""
    admission = gate(2, 0)
    with pytest.raises(RuntimeError):
        async with admission.place(Asked(places=2)):
            raise RuntimeError
    assert admission.running == 0


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_is_lost_in_a_crowd(seed: int) -> None:
    """Hundreds of requests of all sizes, many of them cancelled: never too many at once, and all places come back."""
    admission = gate(5, 1000)
    random_ = random.Random(seed)
    finished: list[int] = []

    async def request(number: int) -> None:
        async with admission.place(Asked(priority=random_.randint(-2, 2), places=random_.randint(1, 7))):
            assert admission.running <= admission.rules.max_running
            await asyncio.sleep(random_.random() / 1000)
            finished.append(number)

    tasks = [asyncio.create_task(request(number)) for number in range(300)]
    for task in random_.sample(tasks, 100):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(finished) == sum(not task.cancelled() for task in tasks) >= 200
    assert (admission.running, admission.waiting) == (0, 0)
    await asyncio.wait_for(admission.until_idle(), 1)


async def test_refused_in_the_queue() -> None:
    """Who is pushed out of a full queue learns it where it waits, as its own quota."""
    crowd = Crowd(gate(1, 2))
    for name in "ab":
        await crowd.add(name, tenant="flood")
    pushed_out = await crowd.add("c", tenant="flood")
    await crowd.add("d", tenant="quiet")
    with pytest.raises(QuotaExceeded):
        await pushed_out
    await crowd.release("a", "b", "d")
    assert sorted(crowd.order) == ["a", "b", "d"]
    await asyncio.wait_for(crowd.admission.until_idle(), 1)


async def test_cancelled_in_the_instant_of_refusal() -> None:
    """Who gives up in the same instant leaves no error that nobody looks at."""
    lost: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    crowd = Crowd(gate(1, 2))
    for name in "ab":
        await crowd.add(name, tenant="flood")
    pushed_out = await crowd.add("c", tenant="flood")
    crowd.go["d"] = asyncio.Event()
    coming = asyncio.create_task(crowd._hold("d", Asked("quiet")))
    while not any(future.done() for future in crowd.admission._futures.values()):
        await asyncio.sleep(0)
    pushed_out.cancel()
    await crowd.settle()
    assert pushed_out.cancelled()
    await crowd.release("a", "b", "d")
    await coming
    gc.collect()
    assert not lost
    assert (crowd.admission.running, crowd.admission.waiting) == (0, 0)


async def test_waiting_too_long() -> None:
    """The age limit ends a wait although nothing else happens."""
    crowd = Crowd(gate(1, 5, max_wait_s=0.05))
    await crowd.add("a")
    waiting = [await crowd.add(name) for name in "bc"]
    for task in waiting:
        with pytest.raises(WaitedTooLong):
            await asyncio.wait_for(task, 1)
    await crowd.release("a")
    assert crowd.order == ["a"]


class Slot:
    """Room for one adapter."""

    def __init__(self) -> None:
        self.capacity = 1
        self.claimed: set[str] = set()

    def is_resident(self, digest: str) -> bool:
        """Never."""
        return False


async def test_a_claim_that_goes_wakes_who_waited_for_it() -> None:
    """When a pin or a promotion lets go of a slot, whoever waits for it is let in at once."""
    crowd, slot = Crowd(gate(5, 5)), Slot()
    crowd.admission.follow(slot)
    slot.claimed = {"pinned"}
    await crowd.add("a", adapter="x")
    assert crowd.order == []
    slot.claimed = set()
    crowd.admission.wake()
    await crowd.settle()
    assert crowd.order == ["a"]
    await crowd.release("a")


class Observed:
    """Writes down what admission tells."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.reasons: list[str] = []

    def waited(self, outcome: str, seconds: float) -> None:
        """One wait more."""
        assert seconds >= 0
        self.outcomes.append(outcome)

    def refused(self, reason: str) -> None:
        """One refusal more."""
        self.reasons.append(reason)


async def test_every_wait_is_told_once() -> None:
    """The observer hears how each request's wait ended, and why one was refused."""
    observed = Observed()
    crowd = Crowd(Admission(Rules(1, 1), observed))
    await crowd.add("a")
    (await crowd.add("b")).cancel()
    await crowd.settle()
    await crowd.add("c")
    with pytest.raises(Overloaded):
        await (await crowd.add("d"))
    crowd.admission.drain()
    with pytest.raises(Draining):
        await (await crowd.add("e"))
    await crowd.release("a", "c")
    assert observed.outcomes == ["admitted", "cancelled", "refused", "refused", "admitted"]
    assert observed.reasons == ["OVERLOADED", "DRAINING"]


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_is_lost_among_tenants_and_adapters(seed: int) -> None:
    """The same with tenants, adapters, two slots and limits: everybody is served, refused or gone, and nothing stays."""
    admission, slot = gate(5, 40, max_waiting_per_tenant=30, max_adapter_wait_s=0.005, max_wait_s=0.3), Slot()
    slot.capacity = 2
    admission.follow(slot)
    random_ = random.Random(seed)
    on_adapters: list[str] = []
    served: list[int] = []

    async def request(number: int) -> None:
        await asyncio.sleep(random_.random() / 10)
        adapter = random_.choice([None, "1", "2", "3", "4"])
        deadline = random_.choice([math.inf, time.monotonic() + 0.05])
        asked = Asked(random_.choice("abc"), adapter, random_.randint(-2, 2), random_.randint(1, 7), deadline=deadline)
        async with admission.place(asked) as place:
            on_adapters.extend([adapter] if adapter else [])
            try:
                assert len(set(on_adapters)) <= 2
                place.served(5)
                await asyncio.sleep(random_.random() / 500)
            finally:
                if adapter:
                    on_adapters.remove(adapter)
        served.append(number)

    tasks = [asyncio.create_task(request(number)) for number in range(200)]
    for task in random_.sample(tasks, 60):
        await asyncio.sleep(0.001)
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert len(served) == ends.count(None) > 50
    assert all(end is None or isinstance(end, (LoraplexError, asyncio.CancelledError)) for end in ends)
    assert (admission.running, admission.waiting, admission.running_adapters) == (0, 0, 0)
    assert not admission._futures
    await asyncio.wait_for(admission.until_idle(), 1)
