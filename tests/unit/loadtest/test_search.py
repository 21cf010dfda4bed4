"""The search for the highest rate: against made-up targets whose limit is known, and once against a server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.commands.run import Options
from loadtest.commands.search import Bounds, execute
from loadtest.drive.search import Ended, Found, Probe, Run, find, samples
from loadtest.errors import BadInput, Exit
from loadtest.judge.verdict import Verdict
from loadtest.plan import arrivals
from loadtest.plan.requirements import Requirements
from loadtest.report import document
from loadtest.selftest.server import ScriptedServer


def target(limit: float, noise: float = 0.0, budget: int = 100, unsure: float = 0.0) -> Run:
    """A target that meets up to `limit`, more or less; within `unsure` of it the first probe of a rate is inconclusive."""
    rng = np.random.default_rng(1)
    left = [budget]

    async def run(rate: float, turn: int) -> Probe | None:
        left[0] -= 1
        if left[0] < 0:
            return None
        if abs(rate / limit - 1) < unsure and not turn:
            return Probe(rate, Verdict.INCONCLUSIVE)
        meets = rate * (1 + rng.normal(0, noise)) <= limit
        return Probe(rate, Verdict.MEETS if meets else Verdict.FAILS)

    return run


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.77, 310.0])
async def test_finds_the_limit(limit: float) -> None:
    """Whether it begins below or far above, the answer lies within 5 % under the limit, met three times."""
    found = await find(target(limit), 4.0, 0.05)
    assert found.ended is Ended.FOUND
    assert limit / 1.05 <= found.best <= limit
    assert found.confirmed == 3
    assert len(found.probes) <= 20


async def test_a_noisy_edge_is_left_for_a_rate_that_holds() -> None:
    """A rate that met by chance does not survive being probed again."""
    found = await find(target(10.0, noise=0.1, budget=200), 4.0, 0.05)
    assert found.ended is Ended.FOUND
    assert [one.verdict for one in found.probes if one.rate == found.best][-3:] == [Verdict.MEETS] * 3
    assert 7 < found.best < 12


async def test_too_few_samples_are_probed_longer() -> None:
    """An inconclusive probe is made once more; only then does it count."""
    found = await find(target(10.0, unsure=0.5), 8.0, 0.05)
    assert found.ended is Ended.FOUND
    assert 10 / 1.05 <= found.best <= 10
    assert sum(one.verdict is Verdict.INCONCLUSIVE for one in found.probes) > 1


async def test_what_cannot_be_resolved_does_not_meet() -> None:
    """A rate that stays inconclusive is no lower bound: what is named has been shown."""

    async def run(rate: float, turn: int) -> Probe:
        return Probe(rate, Verdict.MEETS if rate <= 5 else Verdict.INCONCLUSIVE)

    found = await find(run, 4.0, 0.05)
    assert 5 / 1.05 <= found.best <= 5


async def test_callers_are_whole() -> None:
    """A closed loop is searched in whole callers."""
    found = await find(target(6.5), 4.0, 0.01, whole=True)
    assert (found.best, found.above, found.ended) == (6.0, 7.0, Ended.FOUND)
    assert (await find(target(0.5), 2.0, 0.05, whole=True)).ended is Ended.NONE


async def test_no_rate_meets() -> None:
    """It gives up far below the first rate, not never."""
    found = await find(target(1e-9), 4.0, 0.05)
    assert (found.ended, found.best) == (Ended.NONE, 0.0)
    assert len(found.probes) < 10


@pytest.mark.parametrize("budget", [0, 1, 3, 5])
async def test_a_spent_budget_leaves_what_is_known(budget: int) -> None:
    """Stopped early, it names the bounds that it has, and does not claim that they are final."""
    found = await find(target(40.0, budget=budget), 4.0, 0.05)
    assert found.ended is Ended.BUDGET
    assert len(found.probes) == budget
    assert found.best <= 40


async def test_a_wrong_answer_ends_it() -> None:
    """No further probe is made when the target answers wrongly or is gone."""

    async def run(rate: float, turn: int) -> Probe:
        return Probe(rate, Verdict.INCONCLUSIVE, final=rate > 10)

    found = await find(run, 20.0, 0.05)
    assert (found.ended, len(found.probes)) == (Ended.STOPPED, 1)


@pytest.mark.parametrize(
    ("text", "scaled"),
    [
        ("poisson:2", "poisson:10"),
        ("gamma:2,cv=4", "gamma:10,cv=4"),
        ("ramp:1..3", "ramp:5..15"),
        ("steps:1,2,3", "steps:5,10,15"),
        ("closed:4,think=1s", "closed:10,think=1s"),
    ],
)
def test_scaled_arrivals(text: str, scaled: str) -> None:
    """An arrival keeps its shape at another rate."""
    assert arrivals.scaled(text, 10.0) == scaled
    with pytest.raises(ValueError, match="no other rate"):
        arrivals.scaled("trace:day.csv", 10.0)


def test_samples() -> None:
    """A probe is as long as the strictest requirement needs with two misses: 628 samples for a p99."""
    assert samples(Requirements.model_validate({"ttft": {"p99": "1s"}, "tpot": {"p50": "1s"}})) == 628
    assert samples(Requirements()) == 0


def options(server: ScriptedServer, name: str = "smoke", **overrides: object) -> Options:
    """The command line for a scripted server."""
    quick = {"duration": 0.2, "warmup": 0, "drain": 1, "prompt": 4, "output": 4, "canary": 0, "arrival": "constant:200"}
    return Options(
        names=[name],
        target=f"127.0.0.1:{server.port}",
        engine="fake",
        quick=True,
        overrides=quick | overrides,
        workers=0,
    )


@pytest.mark.slow
async def test_search(scripted: ScriptedServer, tmp_path: Path) -> None:
    """A budget that runs out leaves a report with the curve so far, and the replicas that it takes at least."""
    required = {"requirements": {"ttft": {"p50": "60s"}, "error_rate": None}}
    code = await execute(
        options(scripted, **required),
        Bounds(start=50, tolerance=0.05, budget_s=0.6, times=3, wanted=1000),
        tmp_path / "run",
        as_json=False,
    )
    data = json.loads((tmp_path / "run" / "run.json").read_text())
    document.check(data)
    assert code == data["exit"] == Exit.UNRESOLVED
    assert data["search"]["best"] >= 50
    assert data["search"]["replicas"] == -(-1000 // data["search"]["best"])
    assert (tmp_path / "run" / "plots" / "ttft-by-rate.png").is_file()
    assert "meet the requirements" in (tmp_path / "run" / "summary.md").read_text()
    again = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert "meet the requirements" in " ".join(again.output.split())


async def test_bad_searches(scripted: ScriptedServer, tmp_path: Path) -> None:
    """A search needs one case, something that a rate could miss, and a rate that can be changed."""
    bounds = Bounds(start=0, tolerance=0.05, budget_s=1.0, times=3, wanted=0)
    for wrong, said in (
        (options(scripted, "cliff"), "has 3 cases"),
        (options(scripted, requirements={"error_rate": None}), "nothing is required"),
        (options(scripted, "trace", arrival="trace:x.csv"), "no other rate"),
    ):
        with pytest.raises(BadInput, match=said):
            await execute(wrong, bounds, tmp_path / "run", as_json=False)


def test_nothing_was_probed() -> None:
    """A search that ended before its first probe has nothing to draw."""
    from loadtest.report.curves import searched

    assert searched(Found(), Requirements()) == []
