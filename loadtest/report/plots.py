"""The plots of a report, as SVG that takes the page's colours, and as files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.drive.case import Result
from loadtest.judge import measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#123457"  # stands for the page's text colour, which an inlined SVG inherits
COLOURS = ("#4c8dd6", "#e08a3c", "#4fa86b", "#c9566b", "#8d76c9", "#a08a4a")
_MOST_NAMES = 40
_STRETCHES = 30
_MARKED = {"publish": "*", "preload": "^", "promote": ">", "rollback": "<", "unload": "v"}


@dataclass(frozen=True)
class Plot:
    """A figure with its file name and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def svg(self) -> str:
        """Transparent SVG, text as text; drawing it takes a while, so it is drawn once."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def inline(self) -> str:
        """SVG for a page: ink in the page's colour."""
        text = self.svg.replace(INK, "currentColor")
        for mark in ('id="', "url(#", 'xlink:href="#'):  # ids of several plots must not meet in one page
            text = text.replace(mark, f"{mark}{self.name}-")
        return text

    def save(self, folder: Path) -> None:
        """Write <name>.svg and <name>.png."""
        white = self.svg.replace("<svg ", '<svg style="background: white" ', 1)
        (folder / f"{self.name}.svg").write_text(white)
        self.figure.savefig(folder / f"{self.name}.png", facecolor="white", dpi=144)


def plots(results: list[Result], slots: int = 0) -> Iterator[Plot]:
    """All plots that apply to these cases, of a target with so many adapter slots (0: unknown)."""
    shown = [result for result in results if result.measures["ok"]]
    if not shown:
        return
    yield draw(
        "latency", "TTFT by percentile", "From the schedule; a failed request lies at infinity.",
        lambda _, axes: _spectrum(axes, shown),
    )  # fmt: skip
    yield draw(
        "parts", "What TTFT is made of", "Mean over answered requests, by the server's own account.",
        lambda _, axes: _parts(axes, shown),
    )  # fmt: skip
    if cliff := _cliff_of(shown, slots):
        yield cliff
    for result in shown:
        title, name = result.case.title, result.case.title.replace("/", "-").replace("=", "-")
        yield draw(
            f"time-{name}", f"{title}: over time", "TTFT of each request at its scheduled time; lines: what was done.",
            lambda _, axes, one=result: _over_time(axes, one),
        )  # fmt: skip
        if 1 < len(result.tape.adapters) <= _MOST_NAMES:
            yield draw(
                f"adapters-{name}", f"{title}: TTFT of each adapter over time",
                "Median TTFT of what was due in a stretch of time; white: nobody asked; marks: adapters that came or went.",
                lambda figure, axes, one=result: _heat(figure, axes, one),
            )  # fmt: skip
        if 1 < len(result.correctness.confusion) <= _MOST_NAMES**2:
            yield draw(
                f"who-{name}", f"{title}: who answered", "Asked adapter by row, answering adapter by column: a diagonal.",
                lambda figure, axes, one=result: _confusion(figure, axes, one),
            )  # fmt: skip


def draw(name: str, title: str, caption: str, drawing: Any) -> Plot:
    """A figure with one axes, in the report's style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.color": INK, "axes.edgecolor": INK,
             "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLOURS)
        axes.grid(visible=True, alpha=0.25)
        drawing(figure, axes)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once is enough for all formats
    return Plot(name, title, caption, figure)


def _spectrum(axes: Axes, results: list[Result]) -> None:
    for result in results:
        values = np.sort([measures.ttft(one) for one in result.records])
        ranks = np.arange(1, len(values) + 1) / len(values)
        finite = np.isfinite(values)
        axes.plot(1 / (1 - np.minimum(ranks, 1 - 0.5 / len(values)))[finite], values[finite], label=result.case.title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 10, 100, 1000], ["0", "p50", "p90", "p99", "p99.9"])
    plain_log(axes.yaxis)
    axes.set_ylabel("TTFT, seconds")
    axes.legend()


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis with 0.05 rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _parts(axes: Axes, results: list[Result]) -> None:
    titles = [result.case.title for result in results]
    left = np.zeros(len(results))
    for part in measures.PARTS:
        values = np.array([result.measures["parts"].get(part, 0.0) for result in results])
        axes.barh(titles, values, left=left, label=part)
        left += values
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _over_time(axes: Axes, result: Result) -> None:
    answered = [one for one in result.records if one.times]
    failed = [one.scheduled - result.start for one in result.records if one.status not in ("ok", "cancelled")]
    at = [one.scheduled - result.start for one in answered]
    axes.plot(at, [one.times[0] - one.scheduled for one in answered], ".", alpha=0.7, label="answered")
    if failed:
        axes.plot(failed, np.zeros(len(failed)), "x", color=COLOURS[3], label="failed")
    for event in result.events:
        axes.axvline(event.begun, color=COLOURS[1], alpha=0.6)
        axes.text(event.begun, 1.0, event.do, transform=axes.get_xaxis_transform(), rotation=30, fontsize=7)
    axes.axvspan(0, result.case.workload.warmup, alpha=0.08, color=INK)
    axes.set_xlabel("seconds after the start (grey: warm-up)")
    axes.set_ylabel("TTFT, seconds")
    axes.set_ylim(bottom=0)
    axes.legend()


def _cliff_of(results: list[Result], slots: int) -> Plot | None:
    """The cliff, if the cases differ in how many adapters they ask."""
    from loadtest.report.curves import cliff

    by_scenario: dict[str, list[Result]] = {}
    for result in results:
        by_scenario.setdefault(result.case.scenario, []).append(result)
    for mine in by_scenario.values():
        if slots and len({len(result.tape.adapters) for result in mine}) > 1:
            return cliff([result for result in mine if result.tape.adapters], slots)
    return None


def _heat(figure: Figure, axes: Axes, result: Result) -> None:
    names = sorted({one.adapter for one in result.records})
    end = result.case.workload.duration
    edges = np.linspace(0, end, _STRETCHES + 1)
    cells = np.full((len(names), _STRETCHES), np.nan)
    for row, name in enumerate(names):
        mine = [one for one in result.records if one.adapter == name and one.times]
        stretch = np.digitize([one.scheduled - result.start for one in mine], edges) - 1
        for at in range(_STRETCHES):
            found = [one.times[0] - one.scheduled for one, where in zip(mine, stretch, strict=True) if where == at]
            cells[row, at] = np.median(found) if found else np.nan
    axes.grid(visible=False)
    image = axes.imshow(cells, aspect="auto", cmap="viridis", extent=(0, end, len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), [name or "base" for name in names], fontsize=7)
    for event in result.events:
        if event.adapter in names and event.do in _MARKED:
            axes.plot(event.begun, names.index(event.adapter), _MARKED[event.do], color=COLOURS[3], markersize=6)
    axes.set_xlabel("seconds after the start")
    figure.colorbar(image, label="TTFT, seconds")


def _confusion(figure: Figure, axes: Axes, result: Result) -> None:
    names = sorted({name for pair in result.correctness.confusion for name in pair})
    counts = np.zeros((len(names), len(names)))
    for (asked, answered), count in result.correctness.confusion.items():
        counts[names.index(asked), names.index(answered)] = count
    axes.grid(visible=False)
    image = axes.imshow(np.where(counts > 0, counts, np.nan), cmap="viridis", aspect="auto")
    labels = [name or "base" for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), labels)
    figure.colorbar(image, label="answers")
