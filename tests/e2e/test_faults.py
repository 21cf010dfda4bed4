"""A short fault run on the real engine: what `loraplex loadtest faults` does two hundred times."""

from __future__ import annotations

import pytest

from loadtest.faults.run import Plan, run
from tests.e2e.conftest import ADAPTERS, MODEL

KINDS = (
    "truncate in the registry",
    "swap in the registry",
    "swap in the local copy",
    "swap while loading",
    "poison while loading",
    "vanish while loading",
    "finite but huge",
    "moved to what does not load",
    "promoted and rolled back",
    "storage away",
    "engine stands still",
    "engine killed",
)


@pytest.mark.model
async def test_nobody_notices() -> None:
    """Files go bad, what does not load is promoted, the engine is killed: nobody gets a wrong answer, or none."""
    outcome = await run(Plan(MODEL, ADAPTERS["support@v1"], len(KINDS), 3, kinds=KINDS), lambda _: None)
    assert outcome.wrong == []
    assert outcome.problems == []
    assert outcome.failures == []
    assert outcome.without_status == 0
    assert outcome.alive
    assert all(ledger.statuses["OK"] > 10 for ledger in outcome.others.values())
