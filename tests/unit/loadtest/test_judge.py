"""Percentiles, intervals, verdicts and what counts as right."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest

from loadtest.drive.records import Record, Status
from loadtest.judge import measures, statistics
from loadtest.judge.aliases import Aliases, Move
from loadtest.judge.canaries import Reference, References
from loadtest.judge.correctness import Correctness
from loadtest.judge.validity import growing, tolerance
from loadtest.judge.verdict import Check, Verdict, checks, doubted, exit_code, overall
from loadtest.plan.requirements import Good, Requirements


def record(
    row: int, first: float = 0.1, gap: float = 0.01, counts: tuple[int, ...] = (1, 1, 1), **fields: object
) -> Record:
    """A request due at second `row`, answered after `first`."""
    made = Record(row, "ada", float(row), max_tokens=sum(counts), sent=float(row), status=Status.OK, complete=True)
    made.times = array("d", [row + first + gap * at for at in range(len(counts))])
    made.counts = array("i", counts)
    made.ended = made.times[-1] if made.times else row + first
    made.claimed_tokens = sum(counts)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def judged(records: list[Record], required: Requirements) -> dict[str, Verdict]:
    """The verdicts by requirement."""
    measured = measures.table(records, 0.0, 0.0, float(len(records)))
    is_good = measures.good(measured, required.goodness, set())
    found = checks(required, measured, is_good, Correctness(checked=len(records)), None, 0.0)
    return {check.name: check.verdict for check in found}


def test_failures_are_infinitely_slow() -> None:
    """Five failures in a hundred make the p99 infinite and leave the p50 alone."""
    values = np.array([0.1] * 95 + [math.inf] * 5)
    assert statistics.percentile(values, 0.99) == math.inf
    assert statistics.percentile(values, 0.5) == 0.1


@pytest.mark.parametrize(("q", "misses", "samples"), [(0.9, 0, 29), (0.95, 1, 93), (0.99, 0, 299), (0.99, 2, 628)])
def test_needed_samples(q: float, misses: int, samples: int) -> None:
    """The least sample sizes are those of MLPerf's early stopping."""
    assert statistics.needed(misses, 1 - q) == samples


def test_bundled_tokens() -> None:
    """TPOT leaves out the first message's tokens, ITL counts a gap once for each token."""
    measured = measures.table([record(0, gap=0.05, counts=(5, 5, 5))], 0.0, 0.0, 1.0)
    assert measured.tpot[0] == pytest.approx(0.01)
    assert measures.itl_percentile(measured, 0.5) == pytest.approx(0.01)
    assert measured.itl_weights.sum() == 10


def test_one_token_answer_has_no_tpot() -> None:
    """An answer of one token is good where a TPOT is asked for: it has none."""
    measured = measures.table([record(0, counts=(1,))], 0.0, 0.0, 1.0)
    assert math.isnan(measured.tpot[0])
    assert measures.good(measured, Good(tpot=0.01), set()).all()


def test_answer_without_tokens_is_infinitely_slow() -> None:
    """Whatever its status says, nothing came: it drops out of no latency."""
    measured = measures.table([record(0, counts=())], 0.0, 0.0, 1.0)
    assert measured.ttft[0] == measured.tpot[0] == math.inf


def test_latency_is_from_the_schedule() -> None:
    """A request that the client sent late was waited for all the same."""
    measured = measures.table([record(0, first=1.0, sent=0.9)], 0.0, 0.0, 1.0)
    assert measured.ttft[0] == pytest.approx(1.0)
    assert measured.service_ttft[0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("count", "slow", "verdict"),
    [(298, 0, Verdict.INCONCLUSIVE), (299, 0, Verdict.MEETS), (299, 2, Verdict.INCONCLUSIVE), (299, 9, Verdict.FAILS)],
)
def test_percentile_verdict(count: int, slow: int, verdict: Verdict) -> None:
    """Too few samples never pass, and a few misses among them prove nothing yet."""
    records = [record(row, first=9.0 if row < slow else 0.1) for row in range(count)]
    required = Requirements.model_validate({"ttft": {"p99": "500ms"}})
    assert judged(records, required)["ttft p99"] is verdict


def test_worst_adapter() -> None:
    """One starving adapter is not hidden by the many requests of another."""
    records = [record(row, adapter="big") for row in range(900)]
    records += [record(900 + row, first=5.0, adapter="small") for row in range(60)]
    required = Requirements.model_validate({"good": {"ttft": "1s"}, "attainment": 0.9, "worst_adapter": 0.9})
    found = judged(records, required)
    assert found["attainment"] is Verdict.MEETS
    assert found["worst adapter: small"] is Verdict.FAILS


def test_slowdown_of_nothing() -> None:
    """Where no request was sent alone, a slowdown can be neither good nor bad, and the error rate is judged all the same."""
    required = Requirements.model_validate({"good": {"slowdown": "5x"}, "attainment": 0.9, "error_rate": 0.1})
    found = judged([record(row) for row in range(99)], required)
    assert (found["attainment"], found["error rate"]) == (Verdict.INCONCLUSIVE, Verdict.MEETS)


def test_exit_codes() -> None:
    """A wrong answer outranks an invalid run, which outranks a missed requirement."""
    records = [record(row, first=9.0) for row in range(60)]
    required = Requirements.model_validate({"ttft": {"p90": "1s"}})
    measured = measures.table(records, 0.0, 0.0, 60.0)
    found = checks(required, measured, measured.ok, Correctness(checked=60), None, 0.0)
    assert overall(found) is Verdict.FAILS
    assert [
        int(exit_code(found, problems, incorrect=wrong))
        for problems, wrong in (([], False), (["late"], False), (["late"], True))
    ] == [1, 4, 3]


def test_alias_moves() -> None:
    """While a move is not confirmed both versions may answer; afterwards only the new one."""
    aliases = Aliases({"ada@v1": "", "ada@v2": ""}, {"ada@current": "v1"}, [Move("ada", "current", "v2", 10.0, 12.0)])
    assert aliases.versions("ada", 5.0, 9.0) == {"ada@v1"}
    assert aliases.versions("ada", 9.0, 11.0) == {"ada@v1", "ada@v2"}
    assert aliases.versions("ada", 13.0, 14.0) == {"ada@v2"}
    assert aliases.versions("ada@v1", 13.0, 14.0) == {"ada@v1"}


def test_canaries() -> None:
    """A difference is drift where the reference was unsure, a misroute where somebody else fits, else unexplained."""
    margins = (3.0, 0.01, 3.0, 3.0, 3.0, 3.0)
    references = References(("p",))
    references.answers["ada@v1", 0] = Reference((1, 2, 3, 4, 5, 6), margins, ())
    references.answers["bob@v1", 0] = Reference((9, 8, 7, 6, 5, 4), margins, ())
    kinds = [
        references.judge("ada@v1", 0, answer)
        for answer in ((1, 2, 3, 4, 5, 6), (1, 0, 0, 0, 0, 0), (9, 8, 7, 6, 5, 4), (1, 2, 3, 0, 0, 0))
    ]
    assert [one.kind for one in kinds if one] == ["match", "drift", "misroute", "unexplained"]
    assert kinds[2] is not None
    assert kinds[2].culprit == "bob@v1"
    assert references.power == 1.0


def test_growing_queue() -> None:
    """A queue that rises over the whole run is seen; one that only wobbles is not."""
    steady = [record(row, first=1.0 + row % 3) for row in range(200)]
    rising = [record(row, first=1.0 + row * 0.5) for row in range(200)]
    assert not growing(steady, 0.0, 0.0, 200.0)
    assert growing(rising, 0.0, 0.0, 200.0) is True  # a plain bool, which JSON knows


def test_a_late_client_leaves_times_open_and_nothing_else() -> None:
    """Who answered is as true of a late request; how fast is not, whether it met the limit or missed it."""
    found = [
        Check("ttft p50", 1.0, 0.5, "s", 100, Verdict.MEETS),
        Check("attainment", 0.9, 0.1, "share", 100, Verdict.FAILS),
        Check("error rate", 0.1, 0.0, "share", 100, Verdict.MEETS),
        Check("misroutes", 0, 1, "count", 100, Verdict.FAILS),
    ]
    left = [check.verdict for check in doubted(found, ["12 ms"])]
    assert left == [Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, Verdict.MEETS, Verdict.FAILS]
    assert doubted(found, []) == found


@pytest.mark.parametrize(
    ("required", "allowed"),
    [
        ({}, 0.005),  # 2 % of the median TTFT would be 4 ms
        ({"ttft": {"p99": "2s"}, "good": {"ttft": "1s"}}, 0.020),
        ({"good": {"slowdown": "10x"}}, 0.016),  # of 80 ms alone
        ({"slowdown": {"p50": "2x"}, "ttft": {"p99": "2s"}}, 0.005),
    ],
)
def test_allowed_lag(required: dict[str, object], allowed: float) -> None:
    """A client may be late by 2 % of the strictest limit on TTFT, however that is written, and by 5 ms anyway."""
    found = tolerance(Requirements.model_validate(required), alone_ttft_s=0.08, median_ttft_s=0.2, least=0.005)
    assert found == pytest.approx(allowed)
