"""What admission costs a request.

    python -m tests.unit.runtime.admission_cost

The same callers run once with admission and once without; the difference is its price, queues, futures and counters included.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import uvloop

from engine.runtime.admission import Admission, Asked, Rules
from tests.unit.runtime.simulation import Resident

REQUESTS, TOKENS, ROUNDS = 4000, 32, 5


async def callers(count: int, ask: Callable[[], Asked], admission: Admission | None, resident: Resident) -> float:
    """Seconds that `count` callers take for all requests together."""
    left = REQUESTS

    async def call() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            asked = ask()
            if admission is None:
                for _ in range(TOKENS):
                    await asyncio.sleep(0)
                continue
            async with admission.place(asked) as place:
                if asked.adapter:
                    resident.use(asked.adapter, admission._policy.slots.running)
                for _ in range(TOKENS):
                    await asyncio.sleep(0)
                    place.served(1)

    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(count)))
    return time.perf_counter() - started


async def price(name: str, count: int, adapters: int, tenants: int, patience_s: float = 2.0) -> None:
    """Print the least price of some rounds: what the machine does besides only adds to it."""
    random_ = random.Random(1)
    weights = [1 / rank for rank in range(1, adapters + 1)]
    names = [f"sha256:{number:064}" for number in range(adapters)]

    def ask() -> Asked:
        adapter = random_.choices(names, weights)[0]
        return Asked(f"tenant-{random_.randrange(tenants)}", adapter, prompt_tokens=64, max_tokens=TOKENS)

    prices = []
    for _ in range(ROUNDS):
        resident = Resident(8)
        admission = Admission(Rules(max_running=32, max_waiting=1000, max_adapter_wait_s=patience_s))
        admission.follow(resident)
        without = await callers(count, ask, None, resident)
        prices.append(await callers(count, ask, admission, resident) - without)
    print(f"{name:60} {min(prices) / REQUESTS * 1e6:6.1f} us a request")  # noqa: T201


async def main() -> None:
    """All cases."""
    await price("all fits: 32 callers, 8 adapters, 1 tenant", 32, 8, 1)
    await price("all fits: 32 callers, 8 adapters, 8 tenants", 32, 8, 8)
    await price("a queue: 256 callers, 8 adapters, 8 tenants", 256, 8, 8)
    await price("too few slots: 64 callers, 1,000 adapters, 1 tenant", 64, 1000, 1)
    await price("too few slots: 256 callers, 1,000 adapters, 1 tenant", 256, 1000, 1)
    await price("too few slots: 256 callers, 1,000 adapters, 64 tenants", 256, 1000, 64)
    await price("urgent claims: 256 callers, 1,000 adapters, 1 tenant", 256, 1000, 1, 0.02)
    await price("urgent claims: 256 callers, 1,000 adapters, 64 tenants", 256, 1000, 64, 0.02)


if __name__ == "__main__":
    uvloop.run(main())
