"""Measured results for the benchmark's tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from loadtest.bench.adapters.plan import Grid, stages
from loadtest.bench.adapters.results import Result, results


def made_up(grids: Sequence[Grid]) -> list[Result]:
    """Results of these grids as if they had been run: ours at about 0.9 of the base, the others at half."""
    rng = random.Random(1)
    shares = {"base": 1.0, "ours": 0.9}
    replies = {
        entry: [
            {"tokens_per_s": 300 * shares.get(entry.contender, 0.5) * rng.uniform(0.97, 1.03)}
            | {"base_tokens_per_s": 300.0, "ttft_p50_ms": 1.0, "itl_p50_ms": 2.0, "itl_p99_ms": 3.0}
            for _ in range(3)
        ]
        for stage in stages(grids, (4, 16), 16)
        for entry in stage.entries
    }
    return results(replies)
