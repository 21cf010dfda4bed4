"""The results as a picture: p99 TTFT, adapter hits and movement, strategy by strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cluster.simulation.run import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_COLOURS = {
    "random": "#8d99a6", "least-loaded": "#c08a3e", "consistent-hashing": "#8a6bb1", "power-of-two": "#4f9d69",
    "ours": "#1f5f8b", "oracle": "#c44e52",
}  # fmt: skip
_Value = Callable[[Result], float]


def _moved(one: Result) -> float:
    return 100 * (one.movement.astray + one.movement.joined) if one.movement else math.nan


_PANELS: tuple[tuple[str, _Value, bool], ...] = (  # what it is, and whether on a logarithmic axis
    ("p99 TTFT, ms", lambda one: 1000 * one.ttft_p99_s, True),
    ("requests that found their adapter loaded, %", lambda one: 100 * one.hit_rate, False),
    ("loaded adapters that a request would load\nelsewhere once one replica joins, %", _moved, True),
)


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """A PNG: bars if the results are of one fleet and load, lines over whichever of the two varies if they are not.

    Dashed lines are what cannot be beaten: p99 TTFT by any choice of replicas, and the share of the fleet that is new.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    points = {(one.replicas, one.load) for one in results}
    for axes, (label, value, logarithmic) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        if len(points) == 1:
            _bars(axes, results, label, value, logarithmic)
        else:
            _lines(axes, results, label, value, logarithmic)
    if len(points) > 1:
        figure.axes[1].legend(frameon=False, fontsize=8, loc="center")  # between the hits with and without affinity
    _bounds(figure.axes, results, lines=len(points) > 1)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, results: Sequence[Result], label: str, value: _Value, logarithmic: bool) -> None:
    names = [one.strategy for one in results]
    values = [value(one) for one in results]
    known = [number for number in values if number > 0]
    least = min(known, default=1.0) / 2 if logarithmic else 0.0
    axes.barh(names, values, color=[_COLOURS[name] for name in names])
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(least, 8 * max(known, default=1.0))
        _plain(axes.xaxis)
    for name, length in zip(names, values, strict=True):
        if not math.isnan(length):
            digits = 0 if length >= 100 or not length else 1 if length >= 1 else 2
            axes.annotate(f" {length:,.{digits}f}", (max(length, least), name), va="center", fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.tick_params(labelleft=axes.get_subplotspec().is_first_col())  # type: ignore[union-attr]


def _lines(axes: Axes, results: Sequence[Result], label: str, value: _Value, logarithmic: bool) -> None:
    over_replicas = len({one.replicas for one in results}) > 1
    for name in dict.fromkeys(one.strategy for one in results):
        mine = [one for one in results if one.strategy == name]
        x = [one.replicas if over_replicas else 100 * one.load for one in mine]
        width, order = (2.4, 3) if name == "ours" else (1.2, 2)
        axes.plot(
            x,
            [value(one) for one in mine],
            color=_COLOURS[name],
            label=name,
            linewidth=width,
            zorder=order,
            marker="o",
            markersize=3,
        )
    if over_replicas:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({one.replicas for one in results}))
        _plain(axes.xaxis, locate=False)
    if logarithmic:
        axes.set_yscale("log")
        _plain(axes.yaxis)
    axes.set_xlabel("replicas" if over_replicas else "load, % of the fleet's capacity")
    axes.set_title(label, fontsize=9)


def _bounds(panels: Sequence[Axes], results: Sequence[Result], *, lines: bool) -> None:
    """What cannot be beaten, dashed."""
    style = {"color": "black", "linestyle": "--", "linewidth": 0.8}
    ours = [one for one in results if one.strategy == results[0].strategy]
    over_replicas = len({one.replicas for one in results}) > 1
    x = [one.replicas if over_replicas else 100 * one.load for one in ours]
    for axes, values in (
        (panels[0], [1000 * one.floor_p99_s for one in ours]),
        (panels[2], [100 / (one.replicas + 1) for one in ours]),
    ):
        if lines:
            axes.plot(x, values, **style)  # type: ignore[arg-type]
        else:
            axes.axvline(values[0], **style)  # type: ignore[arg-type]


def _plain(axis: Axis, *, locate: bool = True) -> None:
    """Label a logarithmic axis with 500 rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if locate:
        least, most = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if most < 200 * least else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
    axis.set_minor_locator(NullLocator())
