"""Scenarios, requirements and tapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from loadtest.errors import BadInput
from loadtest.plan import arrivals, popularity, requirements, tape, traces
from loadtest.plan.requirements import Requirements
from loadtest.plan.scenario import Scenario, Workload, cases
from loadtest.plan.strict import checked

ADAPTERS = ("ada", "bob", "cy", "dee")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"arival": "poisson:2"}, "'arival', did you mean 'arrival'?"),
        ({"requirements": {"ttft": {"p98": "1s"}}}, "'requirements.ttft.p98'"),
        ({"arrival": "poisson:0"}, "must be above 0"),
        ({"arrival": "poisson:1e9"}, "100,000 requests/s"),
        ({"arrival": "poisson:20000", "duration": "1h"}, "more than 5,000,000"),
        ({"arrival": "often"}, "poisson, gamma"),
        ({"adapters": 0}, "zero adapters"),
        ({"warmup": "2m"}, "shorter than duration"),
        ({"duration": "soon"}, "500ms, 10s"),
        ({"prompt": "uniform:9..3"}, "9 is above 3"),
        ({"requirements": {"attainment": "95%"}}, "say what is good"),
    ],
)
def test_bad_scenario(data: dict[str, object], named: str) -> None:
    """What is wrong with a scenario is named, with what would be right."""
    with pytest.raises(BadInput) as refused:
        checked(Workload, data, "mine.yaml")
    assert named in refused.value.message


def test_cases_lie_over_quick_over_own() -> None:
    """A case's keys win over quick's, and quick's over the scenario's own."""
    scenario = Scenario(
        name="s", duration=90, arrival="poisson:9", quick={"duration": 20, "arrival": "poisson:2", "cases": ["b"]},
        cases=({"name": "a"}, {"name": "b", "arrival": "poisson:3"}),
    )  # fmt: skip
    (case,) = cases(scenario, quick=True, overrides={"seed": 7})
    assert (case.title, case.workload.duration, case.workload.arrival, case.workload.seed) == (
        "s/b",
        20,
        "poisson:3",
        7,
    )


@pytest.mark.parametrize(
    ("text", "rate", "cv"),
    [("poisson:50", 50, 1), ("gamma:50,cv=4", 50, 4), ("constant:50", 50, 0), ("ramp:10..90", 50, 1)],
)
def test_arrivals(text: str, rate: float, cv: float) -> None:
    """The realised rate and burstiness are those asked for."""
    at = arrivals.times(arrivals.parse(text), 400.0, np.random.default_rng(3))
    gaps = np.diff(at)
    assert len(at) / 400 == pytest.approx(rate, rel=0.1)
    assert (np.diff(at) >= 0).all()
    assert text.startswith("ramp") or gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.15, abs=1e-6)


def test_poisson_gaps_are_exponential() -> None:
    """A Kolmogorov-Smirnov test of the gaps against the exponential distribution passes at 1 %."""
    gaps = np.sort(np.diff(arrivals.times(arrivals.parse("poisson:20"), 200.0, np.random.default_rng(5))))
    empirical = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(empirical - (1 - np.exp(-20 * gaps))).max() < 1.63 / np.sqrt(len(gaps))


def test_popularity() -> None:
    """Zipf gives 1/k; eight slots of a hundred adapters at s = 1 see 52 % of the traffic."""
    assert popularity.shares("zipf:1", ADAPTERS) == pytest.approx(np.array([12, 6, 4, 3]) / 25)
    hundred = tuple(f"a{number}" for number in range(100))
    assert popularity.best_hit_rate(popularity.shares("zipf:1", hundred), 8) == pytest.approx(0.52, abs=0.005)
    assert list(popularity.draw("distinct", ADAPTERS, 5, np.random.default_rng(0))) == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="did you mean 'bob'"):
        popularity.shares("weights:bobb=2", ADAPTERS)


def test_tape_is_the_seed(tmp_path: Path) -> None:
    """The same seed makes the same digest, another one another; a file that was changed is refused."""
    workload = Workload(arrival="gamma:20,cv=2", base_share=0.2, cancel=0.1, canary=0.3)
    made = tape.build(workload, ADAPTERS, canaries=3)
    assert made.sha256 == tape.build(workload, ADAPTERS, canaries=3).sha256
    assert made.sha256 != tape.build(workload.model_copy(update={"seed": 2}), ADAPTERS, canaries=3).sha256
    tape.write(made, tmp_path / "tape.parquet")
    assert tape.read(tmp_path / "tape.parquet").sha256 == made.sha256
    table = pq.read_table(tmp_path / "tape.parquet")
    column = table.column_names.index("max_tokens")
    longer = table.set_column(column, "max_tokens", pc.add(table["max_tokens"], 1))
    pq.write_table(longer, tmp_path / "forged.parquet")
    with pytest.raises(BadInput, match="changed"):
        tape.read(tmp_path / "forged.parquet")


def test_burst_is_one_tenants() -> None:
    """A burst multiplies one adapter's traffic within its time and leaves the others' alone."""
    quiet = Workload(arrival="poisson:40", popularity="uniform", duration=60)
    loud = checked(Workload, quiet.model_dump() | {"burst": {"times": 10, "start": 20, "end": 40}}, "burst")
    before, after = tape.build(quiet, ADAPTERS), tape.build(loud, ADAPTERS)
    assert (after.adapter != 0).sum() == (before.adapter != 0).sum()
    extra = (after.adapter == 0).sum() - (before.adapter == 0).sum()
    assert extra == pytest.approx(10 * 10 * 20, rel=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "t,adapter,in,out\n1.5,bob,10,4\n0.5,,20,8\n",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n1.5,x,10,4,14,y\n0.5,x,20,8,28,y\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.5000000,10,4\n2023-11-16 18:17:03.5000000,20,8\n",
    ],
)
def test_traces(text: str, tmp_path: Path) -> None:
    """Our columns, BurstGPT's and Azure's are read, in order of time, from zero on."""
    (tmp_path / "trace.csv").write_text(text)
    trace = traces.read(tmp_path / "trace.csv")
    assert (trace.at, trace.prompt_tokens, trace.output_tokens) == ([0.0, 1.0], [20, 10], [8, 4])
    assert trace.adapters == (["", "bob"] if text.startswith("t,") else None)


def test_bad_trace_rows_are_named(tmp_path: Path) -> None:
    """No bad row is skipped silently."""
    (tmp_path / "trace.csv").write_text("t,in,out\n0,5,5\nsoon,5,5\n1,0,5\n")
    with pytest.raises(BadInput, match=r"line 3: .*line 4: 0 tokens"):
        traces.read(tmp_path / "trace.csv")


def test_conditions() -> None:
    """A line of conditions says what a file would."""
    data = requirements.from_conditions("ttft.p99<500ms,attainment>=0.95,misroute==0,good.tpot<50ms")
    found = checked(Requirements, data, "--slo")
    assert (found.ttft.p99, found.attainment, found.good.tpot) == (0.5, 0.95, 0.05)
    with pytest.raises(BadInput, match="wrong way"):
        requirements.from_conditions("ttft.p99>500ms")
