"""Admission: who goes next, who is turned away, and that no place is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.errors import Draining, Overloaded
from engine.runtime.admission import Admission


class Crowd:
    """Requests that hold a place until they are let go, and write down in which order they got it."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.go: dict[str, asyncio.Event] = {}

    async def add(self, name: str, priority: int = 0, places: int = 1) -> asyncio.Task[None]:
        """A request arrives."""
        self.go[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, priority, places))
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

    async def _hold(self, name: str, priority: int, places: int) -> None:
        async with self.admission.place(priority, places):
            self.order.append(name)
            await self.go[name].wait()


async def test_first_come_first_served() -> None:
    """Equal priorities go in order of arrival."""
    crowd = Crowd(Admission(1, 10))
    for name in "abc":
        await crowd.add(name)
    await crowd.release("a", "b", "c")
    assert crowd.order == ["a", "b", "c"]


async def test_priority_goes_first() -> None:
    """A higher priority overtakes who waits, and equal ones keep their order."""
    crowd = Crowd(Admission(1, 10))
    await crowd.add("running")
    for name, priority in (("low", -5), ("normal", 0), ("high", 5), ("high too", 5)):
        await crowd.add(name, priority)
    await crowd.release(*crowd.go)
    assert crowd.order == ["running", "high", "high too", "normal", "low"]


async def test_full_queue() -> None:
    """Past the bound one is told at once, with how many wait."""
    admission = Admission(1, 2)
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
    crowd = Crowd(Admission(1, 0))
    await crowd.add("a")
    with pytest.raises(Overloaded):
        await (await crowd.add("b"))
    await crowd.release("a")


async def test_leaving_the_queue() -> None:
    """Who is cancelled while waiting gives the place in the queue back."""
    admission = Admission(1, 1)
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
    admission = Admission(1, 5)
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
    admission = Admission(4, 10)
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
    admission = Admission(2, 10)
    crowd = Crowd(admission)
    await crowd.add("sixteen", places=16)
    assert admission.running == 2
    await crowd.release("sixteen")
    assert admission.running == 0


async def test_draining() -> None:
    """After drain new ones are refused, and who runs or waits already goes on."""
    admission = Admission(1, 5)
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
    await asyncio.wait_for(Admission(1, 1).until_idle(), 1)


async def test_idle_when_the_last_waiter_leaves() -> None:
    """Idle is noticed when the last one finishes although somebody who waited had left."""
    admission = Admission(1, 5)
    crowd = Crowd(admission)
    await crowd.add("a")
    (await crowd.add("b")).cancel()
    await crowd.release("a")
    await asyncio.wait_for(admission.until_idle(), 1)


async def test_error_inside_gives_the_place_back() -> None:
    """A request that fails gives its places back."""
    admission = Admission(2, 0)
    with pytest.raises(RuntimeError):
        async with admission.place(places=2):
            raise RuntimeError
    assert admission.running == 0


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_is_lost_in_a_crowd(seed: int) -> None:
    """Hundreds of requests of all sizes, many of them cancelled: never too many at once, and all places come back."""
    admission = Admission(5, 1000)
    random_ = random.Random(seed)
    finished: list[int] = []

    async def request(number: int) -> None:
        async with admission.place(random_.randint(-2, 2), random_.randint(1, 7)):
            assert admission.running <= admission.max_running
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
