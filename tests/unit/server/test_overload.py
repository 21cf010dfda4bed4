"""Five times more than the server can do: whoever is refused is told so clearly, and nothing is left of it."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.client import AsyncClient
from engine.client.testing import fake_server
from loadtest.bench.endurance.load import Load, goodput
from loadtest.bench.endurance.overload import TIMES, refusals
from loadtest.bench.endurance.vitals import left_over
from tests.unit.server.conftest import engine_of

pytestmark = pytest.mark.slow
PLACES, SECONDS = 4, 8.0


async def test_overload() -> None:
    """Every request has one status of the table, every refusal a hint, answers go on coming, and all places come free."""
    with fake_server(max_running=PLACES, max_waiting=16, max_resident=4) as server:
        engine_of(server).token_interval_s = 0.005
        for name in ("support", "legal"):
            server.publish(name)
        async with AsyncClient(server.target, retries=0) as client:
            load = Load(client, ["", "support", "legal"], deadline_s=5.0)
            peak = goodput(await load.closed(2 * PLACES, 2.0), 2.0)
            seen = await load.at_rate(TIMES * peak, SECONDS)
            told = refusals(seen)
            assert set(told["codes"]) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
            assert told["codes"]["UNAVAILABLE"] > told["codes"]["OK"]
            assert told["without_hint"] == 0
            quarters = Counter(int(4 * (one.ended - seen[0].sent) / SECONDS) for one in seen if one.good)
            assert all(quarters[quarter] for quarter in range(4)), quarters
            assert await left_over(client) == {"running": 0, "waiting": 0, "kv_cache_usage": 0}
            assert (await load.one()).good
