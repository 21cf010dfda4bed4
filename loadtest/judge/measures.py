"""From records to measures. Everything counts from the schedule, and a failed request is infinitely slow.

TTFT   first tokens - scheduled                     (`service` TTFT: - sent; the difference is what coordinated omission hides)
gap    time between two messages of an answer; ITL is that gap per token, once for each token of the message
TPOT   (last message - first) / (tokens - tokens of the first message); undefined when all came at once
E2E    end of the call - scheduled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.intervals import wilson
from loadtest.drive.records import Record, Status
from loadtest.judge.statistics import percentile, weighted_percentile
from loadtest.plan.requirements import QUANTILES, Good

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
PARTS = ("dispatch", "queue", "adapter wait", "prefill", "network and client")


@dataclass(frozen=True)
class Table:
    """The measured requests (those due within the window) as columns, times in seconds; failed ones are inf."""

    rows: Sequence[Record]
    window_s: float
    tokens_in_window: int
    ttft: Floats
    service_ttft: Floats
    tpot: Floats
    """nan where it is undefined."""
    e2e: Floats
    stall: Floats
    """The longest gap of each answer; 0 for an answer in one message."""
    ok: Flags
    counted: Flags
    """False for those that we cancelled on purpose."""
    itl: Floats
    itl_weights: npt.NDArray[np.int32]
    lag: Floats


def table(records: Iterable[Record], start: float, warmup_s: float, end_s: float, noisy: str = "") -> Table:
    """Pick the requests due in [warmup_s, end_s) after `start`, other than the noisy tenant's, and measure each."""
    everything = list(records)
    low, high = start + warmup_s, start + end_s
    rows = [one for one in everything if low <= one.scheduled < high and not (noisy and one.adapter == noisy)]
    ok = np.array([one.status is Status.OK for one in rows], bool)
    itl = [_itl(one) for one, good in zip(rows, ok, strict=True) if good]
    return Table(
        rows=rows,
        window_s=end_s - warmup_s,
        tokens_in_window=_tokens_between(everything, low, high),
        ttft=_column(rows, ttft),
        service_ttft=_column(rows, service_ttft),
        tpot=_column(rows, tpot),
        e2e=_column(rows, e2e),
        stall=_column(rows, stall),
        ok=ok,
        counted=np.array([one.status is not Status.CANCELLED for one in rows], bool),
        itl=np.concatenate([gaps for gaps, _ in itl]) if itl else np.zeros(0),
        itl_weights=np.concatenate([counts for _, counts in itl]) if itl else np.zeros(0, np.int32),
        lag=np.array([one.sent - one.scheduled for one in rows if one.sent], np.float64),
    )


def ttft(one: Record) -> float:
    """Seconds from the schedule to the first tokens; inf of a failed request, and of an answer without any."""
    return one.times[0] - one.scheduled if one.status is Status.OK and one.times else math.inf


def service_ttft(one: Record) -> float:
    """The same from when it was sent."""
    return one.times[0] - one.sent if one.status is Status.OK and one.times else math.inf


def tpot(one: Record) -> float:
    """Seconds for each token after the first message; inf as for TTFT, nan where all tokens came in one message."""
    if one.status is not Status.OK or not one.times:
        return math.inf
    later = one.tokens - one.counts[0]
    return (one.times[-1] - one.times[0]) / later if later else math.nan


def e2e(one: Record) -> float:
    """Seconds from the schedule to the end of the call; inf of a failed request."""
    return one.ended - one.scheduled if one.status is Status.OK else math.inf


def stall(one: Record) -> float:
    """The longest gap between two messages, in seconds; 0 for an answer in one message, inf of a failed request."""
    if one.status is not Status.OK:
        return math.inf
    return float(np.diff(one.times).max()) if len(one.times) > 1 else 0.0


def _column(rows: Sequence[Record], value: Callable[[Record], float]) -> Floats:
    return np.array([value(one) for one in rows], np.float64)


def _itl(one: Record) -> tuple[Floats, npt.NDArray[np.int32]]:
    counts = np.array(one.counts[1:], np.int32)
    return np.diff(np.array(one.times)) / np.maximum(counts, 1), counts


def _tokens_between(records: Iterable[Record], low: float, high: float) -> int:
    return sum(count for one in records for at, count in zip(one.times, one.counts, strict=True) if low <= at < high)


def good(measured: Table, limits: Good, bad_rows: set[int], alone_ttft_s: float = 0.0) -> Flags:
    """Which requests were answered in full, rightly and within the limits. An undefined TPOT is within them."""
    right = measured.ok & np.array(
        [one.row not in bad_rows and one.tokens >= one.max_tokens for one in measured.rows], bool
    )
    for values, limit in (
        (measured.ttft, limits.ttft),
        (measured.tpot, limits.tpot),
        (measured.stall, limits.itl),
        (measured.e2e, limits.e2e),
        (measured.ttft, limits.slowdown * alone_ttft_s if limits.slowdown and alone_ttft_s else None),
    ):
        if limit is not None:
            right = np.asarray(right & ((values <= limit) | np.isnan(values)), bool)
    return np.asarray(right, bool)


def latencies(measured: Table, name: str) -> Floats:
    """The population of a latency: what a percentile of it is taken of. Defined values and failures, no cancelled ones."""
    values: Floats = getattr(measured, name)[measured.counted]
    return np.asarray(values[~np.isnan(values)], np.float64)


def itl_percentile(measured: Table, q: float) -> float:
    """Of all tokens but the first message's. Failed requests have no gaps to count, so they are seen elsewhere."""
    return weighted_percentile(measured.itl, measured.itl_weights, q)


def summary(measured: Table, is_good: Flags, alone_ttft_s: float) -> dict[str, object]:
    """The measures of a case as they go into run.json: seconds, requests/s, tokens/s."""
    counted = measured.counted
    total = int(counted.sum())
    hits = int((is_good & counted).sum())
    seconds = max(measured.window_s, 1e-9)
    good_tokens = sum(one.tokens for one, fine in zip(measured.rows, is_good, strict=True) if fine)
    found: dict[str, object] = {
        "requests": len(measured.rows),
        "ok": int(measured.ok.sum()),
        "failed": int((~measured.ok & counted).sum()),
        "cancelled": int((~counted).sum()),
        "window_s": measured.window_s,
        "offered_rate": len(measured.rows) / seconds,
        "completed_rate": float(measured.ok.sum()) / seconds,
        "tokens_per_s": measured.tokens_in_window / seconds,
        "goodput": hits / seconds,
        "good_tokens_per_s": good_tokens / seconds,
        "attainment": hits / total if total else math.nan,
        "attainment_interval": list(wilson(hits, total)),
        "alone_ttft": alone_ttft_s,
    }
    for name in ("ttft", "service_ttft", "tpot", "e2e", "stall"):
        values = latencies(measured, name)
        found[name] = {key: percentile(values, q) for key, q in QUANTILES.items()}
    found["itl"] = {key: itl_percentile(measured, q) for key, q in QUANTILES.items()}
    return found | {
        "per_adapter": per_adapter(measured, is_good),
        "parts": parts(measured),
        "fairness": fairness(measured),
    }


def per_adapter(measured: Table, is_good: Flags) -> dict[str, dict[str, float]]:
    """Requests, good ones and TTFT of each adapter."""
    names = np.array([one.adapter or "base" for one in measured.rows])
    found = {}
    for name in sorted(set(names[measured.counted])):
        mine = (names == name) & measured.counted
        hits, count = int((is_good & mine).sum()), int(mine.sum())
        found[str(name)] = {
            "requests": count,
            "good": hits,
            "attainment": hits / count,
            "ttft_p50": percentile(measured.ttft[mine], 0.5),
            "ttft_p99": percentile(measured.ttft[mine], 0.99),
        }
    return found


def parts(measured: Table) -> dict[str, float]:
    """What the mean TTFT of answered requests is made of, in seconds; by the server's own account."""
    rows = [one for one in measured.rows if one.status is Status.OK and one.times]
    if not rows:
        return {}
    mean = {
        "dispatch": np.mean([one.sent - one.scheduled for one in rows]),
        "queue": np.mean([one.queue_s for one in rows]),
        "adapter wait": np.mean([one.adapter_wait_s for one in rows]),
        "prefill": np.mean([max(0.0, one.server_ttft_s - one.queue_s - one.adapter_wait_s) for one in rows]),
        "network and client": np.mean([max(0.0, one.times[0] - one.sent - one.server_ttft_s) for one in rows]),
    }
    return {name: float(value) for name, value in mean.items()}


def fairness(measured: Table) -> float:
    """Jain's index over the adapters' mean TTFT, 1 when all wait alike (R. Jain, 1984); nan without answers."""
    waits: dict[str, list[float]] = {}
    for one, wait in zip(measured.rows, measured.ttft, strict=True):
        if math.isfinite(wait):
            waits.setdefault(one.adapter, []).append(float(wait))
    means = np.array([np.mean(values) for values in waits.values()])
    return float(means.sum() ** 2 / (len(means) * (means**2).sum())) if len(means) and means.any() else math.nan
