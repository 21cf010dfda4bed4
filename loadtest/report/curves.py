"""Plots of several runs together: against the rate, one target against another, adapters against slots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.drive.case import Result
from loadtest.drive.search import Found
from loadtest.judge.measures import ttft
from loadtest.judge.verdict import Verdict, cost_per_million
from loadtest.plan.requirements import Requirements
from loadtest.report.plots import COLOURS, INK, Plot, draw, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {Verdict.MEETS: ("o", COLOURS[2]), Verdict.FAILS: ("X", COLOURS[3]), Verdict.INCONCLUSIVE: ("s", COLOURS[5])}
_TARGET = 0.95  # attainment that a rate needs to count in the plot of limits, where none is required


def compared(
    tail: Mapping[str, Sequence[tuple[float, float, float]]], at: Sequence[float], sides: Sequence[str]
) -> list[Plot]:
    """B's TTFT over A's along the percentiles, one line a case: below 1 B is faster."""
    drawn = {title: np.array(found) for title, found in tail.items() if found}
    if not drawn:
        return []
    title = f"TTFT of {sides[1]} as a share of {sides[0]}'s"
    caption = "At each percentile, with a 95 % interval; below 1 it is faster."
    return [draw("ratios", title, caption, lambda _, axes: _ratios(axes, drawn, at))]


def _ratios(axes: Axes, drawn: Mapping[str, Any], at: Sequence[float]) -> None:
    x = np.array(at) * 100
    for title, found in drawn.items():
        finite = np.isfinite(found).all(axis=1)
        (line,) = axes.plot(x[finite], found[finite, 0], label=title)
        axes.fill_between(x[finite], found[finite, 1], found[finite, 2], alpha=0.15, color=line.get_color())
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_xlabel("percentile of TTFT")
    axes.set_ylabel("ratio")
    axes.legend(ncols=2, fontsize=7)


def searched(found: Found, required: Requirements) -> list[Plot]:
    """The curve of a search: who is served well, how long it takes, what it costs to ask for less."""
    shown = sorted((one for one in found.probes if one.result and one.result.measures["ok"]), key=lambda one: one.rate)
    if not shown:
        return []
    results = [one.result for one in shown if one.result]
    rates = [one.rate for one in shown]
    made = [
        draw(
            "goodput", "Good answers by rate", "The knee is where good answers no longer follow the rate; dashed: required.",
            lambda _, axes: _goodput(axes, found, required),
        ),
        draw(
            "ttft-by-rate", "TTFT by rate",
            "From the schedule (lines) and from the send (dotted): what lies between them hides a slow client.",
            lambda _, axes: _ttft(axes, rates, results, required),
        ),
        draw(
            "pareto", "Tokens/s against TPOT", "Up and to the left is better; each point is a rate.",
            lambda _, axes: _pareto(axes, rates, results),
        ),
    ]  # fmt: skip
    if any(one.status == "ok" for result in results for one in result.records):
        made.append(
            draw(
                "tightness", "What a tighter limit on TTFT costs",
                f"Of the probed rates, the best of which {_share(required):.0%} of the answers keep the limit.",
                lambda _, axes: _tightness(axes, rates, results, required),
            )
        )  # fmt: skip
    return made


def cliff(results: Sequence[Result], slots: int) -> Plot:
    """TTFT and the wait for adapters against adapters per slot, beside the hit rate that popularity allows at best."""
    caption = "Bars: the share of requests whose adapter the slots can hold at best, from the popularity alone."
    return draw("cliff", "Adapters against slots", caption, lambda _, axes: _cliff(axes, results, slots))


def _goodput(axes: Axes, found: Found, required: Requirements) -> None:
    probes = [one for one in found.probes if one.result]
    for verdict, (mark, colour) in _MARKS.items():
        mine = [one for one in probes if one.verdict is verdict and one.result]
        if mine:
            axes.plot(
                [one.rate for one in mine], [one.result.measures["attainment"] for one in mine if one.result], mark,
                color=colour, label=verdict,
            )  # fmt: skip
    if required.attainment:
        axes.axhline(required.attainment, color=INK, linestyle="--", linewidth=0.8)
    if found.best:
        axes.axvline(found.best, color=COLOURS[2], linewidth=0.8)
    ordered = sorted(probes, key=lambda one: one.rate)
    beside = axes.twinx()
    rates, good = [one.rate for one in ordered], [one.result.measures["goodput"] for one in ordered if one.result]
    beside.plot(rates, good, "--", marker=".", color=COLOURS[0], linewidth=1)
    beside.set_ylim(bottom=0)
    beside.set_ylabel("good answers/s (blue)")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("rate")
    axes.set_ylabel("share of good answers")
    axes.legend()


def _ttft(axes: Axes, rates: Sequence[float], results: Sequence[Result], required: Requirements) -> None:
    for key, colour in zip(("p50", "p95", "p99"), COLOURS, strict=False):
        for name, style in (("ttft", "-"), ("service_ttft", ":")):
            values = np.array([result.measures[name][key] for result in results], np.float64)
            finite = np.isfinite(values)
            label = key if name == "ttft" else None
            axes.plot(np.array(rates)[finite], values[finite], style, marker=".", color=colour, label=label)
    for _, limit in required.ttft.limits():
        axes.axhline(limit, color=INK, linestyle="--", linewidth=0.8)
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_xlabel("rate")
    axes.set_ylabel("TTFT, seconds")
    axes.legend()


def _pareto(axes: Axes, rates: Sequence[float], results: Sequence[Result]) -> None:
    x = [result.measures["tpot"]["p50"] for result in results]
    y = [result.measures["tokens_per_s"] for result in results]
    axes.plot(x, y, "o", alpha=0.8)
    for at, (rate, *point) in enumerate(zip(rates, x, y, strict=True)):
        if math.isfinite(point[0]) and (at == 0 or rate != rates[at - 1]):
            axes.annotate(f"{rate:g}", (point[0], point[1]), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("TPOT p50, seconds")
    axes.set_ylabel("tokens/s")


def _tightness(axes: Axes, rates: Sequence[float], results: Sequence[Result], required: Requirements) -> None:
    ttfts = [np.array([ttft(one) for one in result.records]) for result in results]
    everything = np.concatenate(ttfts)
    finite = everything[np.isfinite(everything)]
    limits = np.geomspace(max(finite.min(), 1e-4), finite.max(), 60)
    best = []
    for limit in limits:
        holding = [
            at for at, values in enumerate(ttfts) if len(values) and (values <= limit).mean() >= _share(required)
        ]
        best.append(_worth(max(holding, key=lambda at: rates[at]), rates, results, required) if holding else math.nan)
    axes.step(limits, best, where="post")
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set_xlabel("limit on TTFT, seconds")
    axes.set_ylabel("cost of a million tokens" if required.gpu_hour else "best rate")


def _worth(at: int, rates: Sequence[float], results: Sequence[Result], required: Requirements) -> float:
    return cost_per_million(required, results[at].measures["tokens_per_s"]) if required.gpu_hour else rates[at]


def _share(required: Requirements) -> float:
    return required.attainment or _TARGET


def _cliff(axes: Axes, results: Sequence[Result], slots: int) -> None:
    from loadtest.plan import popularity

    ordered = sorted(results, key=lambda result: len(result.tape.adapters))
    x = np.array([len(result.tape.adapters) / slots for result in ordered])
    labels = [f"{len(result.tape.adapters)}/{slots}" for result in ordered]
    hits = [
        popularity.best_hit_rate(popularity.shares(result.case.workload.popularity, result.tape.adapters), slots)
        for result in ordered
    ]
    beside = axes.twinx()
    beside.bar(x, hits, width=0.12, color=INK, alpha=0.12)
    beside.set_ylim(0, 1)
    beside.set_ylabel("best hit rate")
    for key, colour in (("p50", COLOURS[0]), ("p95", COLOURS[1])):
        axes.plot(
            x, [result.measures["ttft"][key] for result in ordered], marker="o", color=colour, label=f"TTFT {key}"
        )
    waits = [result.measures["parts"].get("adapter wait", math.nan) for result in ordered]
    axes.plot(x, waits, marker=".", color=COLOURS[3], label="wait for the adapter, mean")
    axes.set_xscale("log")
    axes.set_xticks(x, labels)
    axes.minorticks_off()
    axes.set_xlabel("adapters / slots")
    axes.set_ylabel("seconds")
    axes.legend()
