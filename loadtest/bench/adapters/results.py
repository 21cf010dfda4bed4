"""From replies to results: medians and extremes, and each contender's ratio to the base of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.bench.adapters.plan import BASE, OURS, Entry


@dataclass(frozen=True)
class Spread:
    """What one figure came to over the rounds."""

    median: float
    least: float
    most: float
    rounds: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up values; raises statistics.StatisticsError when there are none."""
        return cls(statistics.median(values), min(values), max(values), list(values))


@dataclass(frozen=True)
class Result:
    """One line: an entry, its tokens per second, their ratio to the base's, and its latencies' medians in ms."""

    entry: Entry
    rate: Spread
    ratio: Spread
    ttft_p50_ms: float
    itl_p50_ms: float
    itl_p99_ms: float

    def to_json(self) -> dict[str, Any]:
        """Flat, as the report's JSON has it."""
        entry, workload = self.entry, self.entry.workload
        return {
            "contender": entry.contender,
            "adapters": entry.mix.adapters,
            "base_in_batch": entry.mix.base,
            "rank": entry.rank,
            "targets": entry.targets,
            "slots": entry.slots,
            "workload": workload.kind,
            "requests": workload.batch,
            "output_tokens": workload.output,
            "tokens_per_s": asdict(self.rate),
            "ratio_to_base": asdict(self.ratio),
            "ttft_p50_ms": self.ttft_p50_ms,
            "itl_p50_ms": self.itl_p50_ms,
            "itl_p99_ms": self.itl_p99_ms,
        }


def ratios(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Round by round; the median of ratios, not the ratio of medians, as drift moves both of a round alike."""
    return Spread.of([value / base for value, base in zip(values, baseline, strict=True)])


def results(measured: Mapping[Entry, Sequence[Mapping[str, Any]]]) -> list[Result]:
    """One result for each entry, in the order of the plan."""
    return [_result(entry, replies) for entry, replies in measured.items()]


def _result(entry: Entry, replies: Sequence[Mapping[str, Any]]) -> Result:
    columns = {name: [reply[name] for reply in replies] for name in replies[0]}
    return Result(
        entry,
        Spread.of(columns["tokens_per_s"]),
        ratios(columns["tokens_per_s"], columns["base_tokens_per_s"]),
        *(statistics.median(columns[name]) for name in ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")),
    )


def against(found: Sequence[Result], ours: Result) -> dict[str, Spread]:
    """How many times as fast ours is as each other contender on the same workload with the same adapters.

    Round by round, of their ratios to the base, which leave out what the machine did between the two.
    """
    return {
        other.entry.contender: ratios(ours.ratio.rounds, other.ratio.rounds)
        for other in found
        if _same_task(other.entry, ours.entry) and other.entry.contender not in (BASE, OURS)
    }


def _same_task(one: Entry, other: Entry) -> bool:
    return (one.rank, one.targets, one.workload, one.mix) == (other.rank, other.targets, other.workload, other.mix)
