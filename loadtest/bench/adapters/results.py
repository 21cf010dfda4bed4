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
    """One result for each entry, in order. Every workload of a stage has its base."""
    rates = {entry: [reply["tokens_per_s"] for reply in replies] for entry, replies in measured.items()}
    bases = {_place(entry): values for entry, values in rates.items() if entry.contender == BASE}
    return [
        Result(
            entry,
            Spread.of(rates[entry]),
            ratios(rates[entry], bases[_place(entry)]),
            *(statistics.median(reply[name] for reply in replies) for name in ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")),
        )
        for entry, replies in measured.items()
    ]  # fmt: skip


def _place(entry: Entry) -> tuple[object, ...]:
    """Entries that are compared with each other have the same."""
    return entry.rank, entry.targets, entry.workload


def against(found: Sequence[Result], ours: Result) -> dict[str, Spread]:
    """Our ratio, round by round, to each other contender with the same adapters on the same workload."""
    return {
        other.entry.contender: ratios(ours.rate.rounds, other.rate.rounds)
        for other in found
        if _place(other.entry) == _place(ours.entry)
        and other.entry.mix == ours.entry.mix
        and other.entry.contender not in (BASE, OURS)
    }
