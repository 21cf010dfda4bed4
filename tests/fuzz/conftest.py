"""How many inputs, and which: LORAPLEX_FUZZ_INPUTS (20,000 in all by default; `make fuzz`) and LORAPLEX_FUZZ_SEED."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator

import pytest

INPUTS = int(os.environ.get("LORAPLEX_FUZZ_INPUTS", "20000"))
SEED = int(os.environ.get("LORAPLEX_FUZZ_SEED") or time.time_ns() % 2**32)
# What of all the inputs each target gets.
SHARES = {
    "messages": 0.35, "bytes": 0.1, "tenants": 0.2, "credentials": 0.05, "registry": 0.1, "adapters": 0.1, "files": 0.1,
}  # fmt: skip

Dice = Callable[[str], Iterator[random.Random]]


@pytest.fixture
def dice() -> Dice:
    """For a target, one generator of random numbers for each input. A failure prints the seed that repeats the run."""

    def each(target: str) -> Iterator[random.Random]:
        print(f"again: LORAPLEX_FUZZ_SEED={SEED} LORAPLEX_FUZZ_INPUTS={INPUTS}")  # noqa: T201
        for number in range(int(INPUTS * SHARES[target])):
            yield random.Random(f"{SEED}/{target}/{number}")

    return each
