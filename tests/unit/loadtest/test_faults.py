"""Fault runs: short, on a server with made-up answers; and what must fail one does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.client.testing import write_adapter, write_base
from loadtest.errors import BadInput
from loadtest.faults.command import execute, show
from loadtest.faults.damage import DAMAGES, WEIGHTS
from loadtest.faults.kinds import Happened, faults, judged
from loadtest.faults.load import Ledger
from loadtest.faults.run import Outcome, Plan, document, run


@pytest.mark.slow
async def test_nobody_notices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All faults that need no real engine, under load: all requests of the others are answered, by their own adapter."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    kinds = faults(processes=False)
    seen: list[str] = []
    plan = Plan(tmp_path / "base", tmp_path / "adapter", len(kinds), 1, "fake", callers=1)
    outcome = await run(plan, seen.append)
    assert sorted(seen) == sorted(kinds)
    assert outcome.problems == outcome.wrong == outcome.failures == []
    assert outcome.good
    assert all(ledger.statuses["OK"] > 10 for ledger in outcome.others.values())
    show(document(outcome))
    assert "0 wrong answers" in capsys.readouterr().out


async def test_there_must_be_an_adapter(tmp_path: Path) -> None:
    """A mistyped folder is told before a server is started."""
    with pytest.raises(BadInput, match="no adapter"):
        await execute(Plan(tmp_path, tmp_path / "typo", 1, 1, "fake"), as_json=True)


@pytest.mark.parametrize("what", ["no status", "untyped", "wrong", "failed", "unexpected", "dead"])
def test_what_must_not_be_fails_the_run(what: str) -> None:
    """A request without a final status, a wrong answer, another's failure, an unexpected end, a dead engine."""
    outcome = Outcome(others={"a": Ledger()})
    assert outcome.good
    match what:
        case "no status":
            outcome.victim.statuses["DEADLINE_EXCEEDED"] += 1
        case "untyped":
            outcome.others["a"].statuses["INTERNAL"] += 1
        case "wrong":
            outcome.victim.wrong.append("asked a, b answered")
        case "failed":
            outcome.others["a"].failures.append("UNAVAILABLE")
        case "unexpected":
            outcome.happened.append(("swap", judged("OK", {"DATA_LOSS"})))
        case _:
            outcome.alive = False
    assert not outcome.good
    assert not document(outcome)["good"]


def test_what_another_fault_may_cause_is_allowed() -> None:
    """UNAVAILABLE may always come of something else that is broken at the same time; other statuses may not."""
    assert judged("UNAVAILABLE", {"OK"}) == Happened("UNAVAILABLE")
    assert judged("INTERNAL", {"OK"}).problem


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_damage_changes_the_file(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    """Afterwards the bytes are others, or gone; the other adapter's file is as it was."""
    for seed, name in enumerate(("one", "other")):
        write_adapter(tmp_path / name, seed=seed)
    file, other = tmp_path / "one" / WEIGHTS, tmp_path / "other" / WEIGHTS
    before, theirs = file.read_bytes(), other.read_bytes()
    damage(file, other, random.Random(1))
    assert not file.exists() or file.read_bytes() != before
    assert other.read_bytes() == theirs
