"""What a third adapter of two slots costs, by how long it may be made to wait: in virtual time, with the real policy.

    python -m tests.unit.runtime.patience

Two busy adapters with eight callers each, and one caller who asks for a third one without pause; answers of 8 to 48 tokens.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

from engine.runtime.admission.policy import Rules
from engine.runtime.admission.tickets import Asked
from tests.unit.runtime.simulation import Caller, Record, Simulation, endless

THIRD = Asked(adapter="third", prompt_tokens=20, max_tokens=48)
_BOUNDS_S = (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)


def third_of_two_slots(rules: Rules, third: Iterator[tuple[Asked, int]], until: float) -> Simulation:
    """So many seconds of the two busy adapters; the third's caller begins after 20."""
    random_ = random.Random(1)
    sim = Simulation(rules, 2)
    for number in range(16):
        asked = Asked(adapter="uv"[number % 2], prompt_tokens=20, max_tokens=48)
        sim.call(Caller(endless(random_, lambda asked=asked: asked, 8, 48)))
    sim.call(Caller(third), at=20.0)
    return sim.run(until)


def that_ran(sim: Simulation) -> tuple[list[Record], list[Record]]:
    """The busy adapters' requests, and the third's."""
    ran = [record for record in sim.records if record.admitted is not None]
    return [r for r in ran if r.asked is not THIRD], [r for r in ran if r.asked is THIRD]


def always() -> Iterator[tuple[Asked, int]]:
    """Requests for the third adapter without end."""
    return endless(random.Random(2), lambda: THIRD, 8, 48)


def made(records: list[Record]) -> int:
    """The tokens of the answers that are complete."""
    return sum(record.length for record in records if record.finished is not None)


def main() -> None:
    """Print the curve."""
    sys.stdout.write("max_adapter_wait_s  busy ones keep  third waits, of their p99  third's median wait\n")
    for bound_s in _BOUNDS_S:
        rules = Rules(32, 256, max_adapter_wait_s=bound_s)
        alone, _ = that_ran(third_of_two_slots(rules, iter(()), 620))
        busy, third = that_ran(third_of_two_slots(rules, always(), 620))
        waits, others = sorted(r.wait for r in third), sorted(r.wait for r in busy)
        times = waits[-1] / others[int(0.99 * len(others))]
        kept = made(busy) / made(alone)
        sys.stdout.write(f"{bound_s:18.1f}{kept:16.2f}{times:27.1f}{waits[len(waits) // 2]:19.1f} s\n")


if __name__ == "__main__":
    main()
