"""What is measured about one streamed answer, and about many.

TTFT is the time from sending a request to its first token; ITL (inter-token latency) the gaps between an answer's later
tokens; throughput all generated tokens over the time from the first request's start to the last one's end.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field


@dataclass
class Sample:
    """One answer; times are from time.perf_counter, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    token_times: list[float] = field(default_factory=list)
    error: str = ""

    def tokens(self, count: int) -> None:
        """Note that `count` tokens have just come."""
        self.token_times.extend([time.perf_counter()] * count)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.token_times[0] - self.started

    @property
    def ended(self) -> float:
        """When the last token came."""
        return self.token_times[-1]


@dataclass(frozen=True)
class Summary:
    """What many answers came to. Milliseconds, except for `tokens_per_s`."""

    requests: int
    failed: int
    tokens: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


def summarize(samples: list[Sample]) -> Summary:
    """Sum up; failed requests count as failed and nowhere else. Raises ValueError when all have failed."""
    good = [sample for sample in samples if not sample.error and sample.token_times]
    if not good:
        raise ValueError(f"all requests failed: {samples[0].error if samples else 'there were none'}")
    tokens = sum(len(sample.token_times) for sample in good)
    seconds = max(sample.ended for sample in good) - min(sample.started for sample in good)
    ttfts = [sample.ttft_s * 1000 for sample in good]
    gaps = [
        (after - before) * 1000
        for sample in good
        for before, after in zip(sample.token_times, sample.token_times[1:], strict=False)
    ]
    return Summary(
        requests=len(samples),
        failed=len(samples) - len(good),
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        ttft_p50_ms=interpolated_percentile(ttfts, 50),
        ttft_p99_ms=interpolated_percentile(ttfts, 99),
        itl_p50_ms=interpolated_percentile(gaps, 50),
        itl_p99_ms=interpolated_percentile(gaps, 99),
    )


def interpolated_percentile(values: list[float], percent: int) -> float:
    """The value below which `percent` percent lie, between two values if need be; 0 when there are none.

    The load test takes the nearest rank (judge/statistics.py), as it counts a failed request as infinitely slow.
    """
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
