"""One line for each requirement: MEETS, DOES NOT MEET or INCONCLUSIVE, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from engine.intervals import wilson
from loadtest.errors import Exit
from loadtest.judge.canaries import SEPARABLE, References
from loadtest.judge.correctness import Correctness
from loadtest.judge.measures import Flags, Table, itl_percentile, latencies
from loadtest.judge.statistics import needed, percentile, surely_above, surely_at_most
from loadtest.plan.requirements import LATENCIES, QUANTILES, Requirements

_NOT_ALONE = "no request was sent alone: needs canaries"
_AT_LEAST = ("attainment", "worst adapter", "goodput")


class Verdict(StrEnum):
    """What can be said about a requirement."""

    MEETS = "MEETS"
    FAILS = "DOES NOT MEET"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Check:
    """A requirement and what became of it. `unit`: s, share, x, 1/s or count."""

    name: str
    limit: float
    value: float
    unit: str
    samples: int
    verdict: Verdict
    low: float = math.nan
    high: float = math.nan
    note: str = ""

    @property
    def timed(self) -> bool:
        """Whether the value depends on how punctual the client was."""
        return self.unit in ("s", "x") or self.name.startswith(_AT_LEAST)

    @property
    def headroom(self) -> float:
        """How far the value stays from its limit, as a share of the limit; negative when it is past it; nan for zeros."""
        if not self.limit or not math.isfinite(self.value):
            return math.nan
        return (self.value - self.limit) / self.limit * (1 if self.name.startswith(_AT_LEAST) else -1)


def checks(
    required: Requirements,
    measured: Table,
    is_good: Flags,
    correctness: Correctness,
    references: References | None,
    alone_ttft_s: float,
) -> list[Check]:
    """Judge every requirement that was given, and the three that always hold: no misroute, no lost, no doubled token."""
    return [
        *_latency_checks(required, measured),
        *_slowdown_checks(required, measured, alone_ttft_s),
        *_known(
            required,
            alone_ttft_s,
            [*_share_checks(required, measured, is_good), *_rate_checks(required, measured, is_good)],
        ),
        *_correctness_checks(required, correctness, references),
    ]


def _known(required: Requirements, alone_ttft_s: float, found: Sequence[Check]) -> list[Check]:
    """The checks on good answers; none can be judged where good is a slowdown of nobody knows what."""
    if not required.goodness.slowdown or alone_ttft_s:
        return list(found)
    return [
        replace(check, verdict=Verdict.INCONCLUSIVE, note=_NOT_ALONE) if check.name.startswith(_AT_LEAST) else check
        for check in found
    ]


def doubted(found: Sequence[Check], late: Sequence[str]) -> list[Check]:
    """The checks of a run whose client was late: what depends on times is left open, and says why."""
    if not late:
        return list(found)
    return [
        replace(check, verdict=Verdict.INCONCLUSIVE, note="the client was late")
        if check.timed and check.verdict is not Verdict.INCONCLUSIVE
        else check
        for check in found
    ]


def overall(found: Sequence[Check]) -> Verdict:
    """One failure decides; one doubt leaves it open."""
    verdicts = {check.verdict for check in found}
    return next((one for one in (Verdict.FAILS, Verdict.INCONCLUSIVE) if one in verdicts), Verdict.MEETS)


def exit_code(found: Sequence[Check], problems: Sequence[str], *, incorrect: bool) -> Exit:
    """A wrong answer, then an invalid run, then a missed requirement, then a doubt."""
    if incorrect:
        return Exit.INCORRECT
    if problems:
        return Exit.UNRESOLVED
    verdict = overall(found)
    return {Verdict.MEETS: Exit.PASS, Verdict.FAILS: Exit.MISSED, Verdict.INCONCLUSIVE: Exit.UNRESOLVED}[verdict]


def replicas(required_rate: float, rate_of_one: float) -> int:
    """How many replicas take `required_rate` if one takes `rate_of_one` within the requirements."""
    return math.ceil(required_rate / rate_of_one - 1e-9) if rate_of_one > 0 else 0


def cost_per_million(required: Requirements, good_tokens_per_s: float) -> float:
    """Price of a million good tokens: gpus x price per hour / 3600 / good tokens per second x 10^6; nan if unpriced."""
    if not required.gpu_hour or good_tokens_per_s <= 0:
        return math.nan
    return required.gpus * required.gpu_hour / 3600 / good_tokens_per_s * 1e6


def _judge(misses: int, trials: int, share: float) -> tuple[Verdict, str]:
    """Whether at most `share` of the trials miss; the note says how many samples would settle it."""
    if surely_at_most(misses, trials, share):
        return Verdict.MEETS, ""
    if surely_above(misses, trials, share):
        return Verdict.FAILS, ""
    return (
        Verdict.INCONCLUSIVE,
        f"{misses} of {trials} miss; with {misses} misses it takes {needed(misses, share)} samples",
    )


def _latency_checks(required: Requirements, measured: Table) -> Iterator[Check]:
    for name in LATENCIES:
        for key, limit in getattr(required, name).limits():
            q = QUANTILES[key]
            if name == "itl":
                weights = measured.itl_weights
                misses, count = int(weights[measured.itl > limit].sum()), int(weights.sum())
                value = itl_percentile(measured, q)
            else:
                values = latencies(measured, name)
                misses, count = int((values > limit).sum()), len(values)
                value = percentile(values, q)
            verdict, note = _judge(misses, count, 1 - q)
            yield Check(f"{name} {key}", limit, value, "s", count, verdict, note=note)


def _slowdown_checks(required: Requirements, measured: Table, alone_ttft_s: float) -> Iterator[Check]:
    for key, limit in required.slowdown.limits():
        if not alone_ttft_s:
            yield Check(f"slowdown {key}", limit, math.nan, "x", 0, Verdict.INCONCLUSIVE, note=_NOT_ALONE)
            continue
        values = latencies(measured, "ttft") / alone_ttft_s
        verdict, note = _judge(int((values > limit).sum()), len(values), 1 - QUANTILES[key])
        yield Check(f"slowdown {key}", limit, percentile(values, QUANTILES[key]), "x", len(values), verdict, note=note)


def _share_checks(required: Requirements, measured: Table, is_good: Flags) -> Iterator[Check]:
    counted = measured.counted
    total, hits = int(counted.sum()), int((is_good & counted).sum())
    if required.attainment is not None:
        yield _attainment("attainment", required.attainment, hits, total)
    if required.worst_adapter is not None:
        yield _worst(required.worst_adapter, measured, is_good)
    if required.error_rate is not None:
        errors = int((~measured.ok & counted).sum())
        verdict, note = _judge(errors, total, required.error_rate)
        if required.error_rate == 0:
            verdict, note = (Verdict.FAILS, "") if errors else (Verdict.MEETS, _rule_of_three(total))
        low, high = wilson(errors, total)
        yield Check(
            "error rate",
            required.error_rate,
            errors / total if total else math.nan,
            "share",
            total,
            verdict,
            low,
            high,
            note,
        )


def _attainment(name: str, limit: float, hits: int, total: int) -> Check:
    verdict, note = _judge(total - hits, total, 1 - limit)
    if limit >= 1:
        verdict = Verdict.MEETS if hits == total and total else Verdict.FAILS
    low, high = wilson(hits, total)
    return Check(name, limit, hits / total if total else math.nan, "share", total, verdict, low, high, note)


def _worst(limit: float, measured: Table, is_good: Flags) -> Check:
    """The adapter with the least attainment. Those too rarely asked to prove anything are pooled into one, "(rare)"."""
    names = np.array([one.adapter or "base" for one in measured.rows])
    tally: dict[str, tuple[int, int]] = {}
    for name in set(names[measured.counted]):
        mine = (names == name) & measured.counted
        hits, total = int((is_good & mine).sum()), int(mine.sum())
        who = str(name) if total >= needed(0, 1 - limit) else "(rare)"
        before = tally.get(who, (0, 0))
        tally[who] = before[0] + hits, before[1] + total
    each = [_attainment(f"worst adapter: {name}", limit, *counts) for name, counts in tally.items()]
    if not each:
        return Check("worst adapter", limit, math.nan, "share", 0, Verdict.INCONCLUSIVE, note="nobody was asked")
    order = [Verdict.FAILS, Verdict.INCONCLUSIVE, Verdict.MEETS]
    return min(each, key=lambda check: (order.index(check.verdict), check.value))


def _rate_checks(required: Requirements, measured: Table, is_good: Flags) -> Iterator[Check]:
    if required.goodput is None:
        return
    hits = int((is_good & measured.counted).sum())
    value = hits / max(measured.window_s, 1e-9)
    offered = len(measured.rows) / max(measured.window_s, 1e-9)
    verdict, note = (Verdict.MEETS, "") if value >= required.goodput else (Verdict.FAILS, "")
    if verdict is Verdict.FAILS and offered < required.goodput:
        verdict, note = Verdict.INCONCLUSIVE, f"only {offered:.3g} requests/s were offered"
    yield Check("goodput", required.goodput, value, "1/s", hits, verdict, note=note)


def _correctness_checks(
    required: Requirements, correctness: Correctness, references: References | None
) -> Iterator[Check]:
    counts, compared = correctness.canaries, correctness.compared
    checked = max(correctness.checked, compared)
    verdict = _zero(correctness.misroutes, required.misroutes)
    note = "" if correctness.misroutes else f"{compared} canaries, {_rule_of_three(compared)}"
    if verdict is Verdict.MEETS and (doubt := _doubt(checked, compared, references, counts["unexplained"])):
        verdict, note = Verdict.INCONCLUSIVE, doubt
    yield Check("misroutes", required.misroutes, correctness.misroutes, "count", checked, verdict, note=note)
    for name, value, limit in (
        ("lost tokens", correctness.lost_tokens, required.lost_tokens),
        ("duplicated tokens", correctness.duplicated_tokens, required.duplicated_tokens),
    ):
        yield Check(name, limit, value, "count", checked, _zero(value, limit))


def _doubt(checked: int, compared: int, references: References | None, unexplained: int) -> str:
    """Why no misroute does not mean that there was none."""
    if not checked:
        return "no answer came"
    if references and references.unstable:
        return f"references differ when taken again: {references.unstable[0]}"
    if references and references.power < SEPARABLE:
        return f"only {references.power:.0%} of the pairs of adapters answer differently: give prompts that tell them apart"
    if unexplained > max(0, compared // 1000):
        return f"{unexplained} of {compared} canaries differ from every reference"
    return ""


def _zero(value: int, limit: int) -> Verdict:
    return Verdict.MEETS if value <= limit else Verdict.FAILS


def _rule_of_three(trials: int) -> str:
    return f"so the true rate is below {3 / trials:.2g} (95 %)" if trials else "nothing was compared"
