"""Two ways to the same replicas: who is asked, what counts as a hit, and which figure is divided by which."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.client import AsyncClient
from loadtest.bench.callers import Request
from loadtest.bench.router.affinity import ROUND_ROBIN, ROUTER, Counting, ratios


class Scripted:
    """A client whose answers waited `waits` for their adapter, one after the other."""

    def __init__(self, *waits: float) -> None:
        self._waits = list(waits)

    async def stream(self, **_: Any) -> AsyncGenerator[SimpleNamespace, None]:
        """Two tokens, and the timings with the second."""
        yield SimpleNamespace(token_ids=(1,), timings=None)
        yield SimpleNamespace(token_ids=(2,), timings=SimpleNamespace(adapter_wait_s=self._waits.pop(0)))


async def test_replicas_are_asked_in_turn_and_hits_counted() -> None:
    """An answer whose adapter had to be waited for is no hit."""
    target = Counting(cast("list[AsyncClient]", [Scripted(0.0, 0.0), Scripted(0.2, 0.0)]))
    for _ in range(4):
        assert [tokens async for tokens in target.stream(Request("x", 2, "a"))] == [1, 1]
    assert target.hit_rate(60) == pytest.approx(0.75)


def test_each_round_is_divided_by_its_own_baseline() -> None:
    """A machine that is slower in one round moves both ways, and not the ratio."""

    def figures(speed: float, hit_rate: float) -> dict[str, float]:
        return {
            "hit_rate": hit_rate,
            "ttft_p50_ms": 100 / speed,
            "ttft_p95_ms": 200 / speed,
            "tokens_per_s": 10 * speed,
        }

    rounds = {
        ROUND_ROBIN: [figures(1, 0.4), figures(0.5, 0.4), figures(1, 0.4)],
        ROUTER: [figures(2, 0.8), figures(1, 0.8), figures(2, 0.8)],
    }
    assert ratios(rounds) == {"hit_rate": 2, "ttft_p50_ms": 0.5, "ttft_p95_ms": 0.5, "tokens_per_s": 2}
