"""Scenarios, requirements and tapes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from loadtest.drive.fleet import fleet, own_adapters
from loadtest.errors import BadInput
from loadtest.plan import arrivals, popularity, requirements, schemas, tape, traces
from loadtest.plan.prompts import prompt_of_row
from loadtest.plan.requirements import Requirements
from loadtest.plan.scenario import Scenario, Workload, cases, chosen, shipped
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
        ({"arrival": "poisson:5", "burst": {"start": "50%", "end": "20%"}}, "must end (20%) after"),
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


def test_a_row_always_asks_the_same() -> None:
    """Runs of one tape on two days can be compared: a row's text is the seed's, whoever sends it."""
    assert prompt_of_row(1, 2, 3) == "day year child"
    assert len({prompt_of_row(1, row, 16) for row in range(1000)}) == 1000


def test_burst_is_one_tenants() -> None:
    """A burst multiplies one adapter's traffic within its time and leaves the others' alone."""
    quiet = Workload(arrival="poisson:40", popularity="uniform", duration=60)
    loud = checked(Workload, quiet.model_dump() | {"burst": {"times": 10, "start": "25%", "end": 0.75}}, "burst")
    before, after = tape.build(quiet, ADAPTERS), tape.build(loud, ADAPTERS)
    assert (after.adapter != 0).sum() == (before.adapter != 0).sum()
    extra = (after.adapter == 0).sum() - (before.adapter == 0).sum()
    assert extra == pytest.approx(10 * 10 * 30, rel=0.1)


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


def test_schemas_are_fresh() -> None:
    """The committed schemas are those of the models; `python -m loadtest.plan.schemas` makes them so."""
    for path, text in schemas.files().items():
        assert path.read_text() == text, path.name


@pytest.mark.parametrize("name", shipped())
def test_shipped_scenarios_fit_their_schema(name: str) -> None:
    """Every shipped scenario fits the schema that its first line names, and a wrong key, wherever it is, does not."""
    text = (resources.files("loadtest") / "scenarios" / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=../schemas/scenario.json\n")
    validator = jsonschema.Draft202012Validator(schemas.scenario())
    data = yaml.safe_load(text)
    assert list(validator.iter_errors(data)) == []
    for wrong in (data | {"quick": {"durration": "3s"}}, data | {"cases": [{"arival": "poisson:2"}]}):
        assert list(validator.iter_errors(wrong))


def test_requirements_schema() -> None:
    """What the models take, the schema takes: limits as text or number; an unknown percentile it does not."""
    validator = jsonschema.Draft202012Validator(schemas.requirements())
    good = {"ttft": {"p99": "500ms"}, "slowdown": {"p50": "5x", "p90": 7}, "good": {"itl": 0.2}, "attainment": "95%"}
    assert list(validator.iter_errors(good)) == []
    checked(Requirements, good, "good.yaml")
    assert list(validator.iter_errors({"ttft": {"p98": 1}}))


BAD_TRACES = {
    "no columns": ("a,b\n1,2\n", "no column t and no column in"),
    "empty": ("t,in,out\n", "no rows"),
    "endless": ("t,in,out\ninf,5,5\n", "time inf"),
    "no date": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-99-16 18:17:04.5,10,4\n", "line 2"),
    "short row": ("t,in,out\n0,5\n", "line 2"),
    "failed request": ("Timestamp,Request tokens,Response tokens\n5,100,0\n", "line 2: 0 tokens"),
    "fraction": ("t,in,out\n0,5.5,5\n", "line 2"),
    "many": ("t,in,out\n" + "x,5,5\n" * 9, "and 6 more"),
    "no text": (b"t,in,out\n\xff\xfe,5,5\n", "cannot read the trace"),
}


@pytest.mark.parametrize("kind", BAD_TRACES)
def test_bad_traces(kind: str, tmp_path: Path) -> None:
    """Whatever is wrong with a trace, its line is named before anything is sent."""
    text, said = BAD_TRACES[kind]
    (tmp_path / "trace.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput) as refused:
        tape.build(Workload(arrival=f"trace:{tmp_path / 'trace.csv'}"), ADAPTERS)
    assert said in refused.value.message


def test_one_case_by_its_name() -> None:
    """`cliff/a32` is one case of the scenario, also where its quick form leaves it out, and a wrong name finds the nearest."""
    titles = [case.title for case in chosen(["cliff/a32", "steady"], quick=True, overrides={"duration": "9s"})]
    assert titles == ["cliff/a32", "steady"]
    assert [case.title for case in chosen(["skew/uniform"], quick=False, overrides={})] == ["skew/uniform"]
    with pytest.raises(BadInput, match=r"no case 'a31', did you mean 'a3?\d+'"):
        chosen(["cliff/a31"], quick=True, overrides={})


def test_each_case_asks_its_own_adapters(tmp_path: Path) -> None:
    """A scenario asks the same adapters whichever others run beside it, and no more markers are made than are asked."""
    given = Path(__file__).parents[3] / "examples" / "support" / "v1"
    asked = [own_adapters(case, [given]) for case in chosen(["steady", "churn", "cliff/a4"], quick=True, overrides={})]
    assert asked[0].workload.adapters == ("support",)
    assert asked[1].workload.adapters == ("support", "load-001", "load-002", "load-003", "load-004")
    assert asked[2].workload.adapters == 4
    assert list(fleet([given], asked[::2], tmp_path)) == ["support", "load-001", "load-002", "load-003"]
    with pytest.raises(BadInput, match="same name"):
        fleet([given, given], asked, tmp_path)
