"""The chart: how much of the base model's speed is left, ours beside the others, the base's line at 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.bench.adapters.plan import BASE, OURS, PEFT, STOCK
from loadtest.bench.adapters.results import Result
from loadtest.bench.adapters.workloads import Mix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {OURS: "#0b7a75", STOCK: "#c9713b"} | dict.fromkeys(PEFT, "#7d8597")
_LEGEND = {OURS: "Loraplex", STOCK: "vLLM's own kernels", PEFT[0]: "transformers + PEFT"}
_SHORT = {"peft-one": "one at\na time", "peft-grouped": "grouped", "peft-mixed": "adapter_\nnames"}
_TITLE = "Speed of a batch with adapters, as a share of the base model's"
_INK, _MUTED, _FAINT = "#1f2933", "#52606d", "#d9dee4"
_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)
_BAR = 0.38  # of the distance between two groups
_HEAD, _ROW, _FOOT = 0.65, 3.5, 0.15  # inches: title and legend, one row of panels, the line below them
_MOST_BARS = 36  # in a row
_DPI = 200
Label = Callable[[Result], str]
_FACETS: dict[str, Callable[[Result], object]] = {
    "mix": lambda result: result.entry.mix,
    "rank": lambda result: result.entry.rank,
    "targets": lambda result: result.entry.targets,
    "batch": lambda result: result.entry.workload.batch,
}
_HEADLINE = {"mix": Mix(4), "rank": 16, "targets": "attention", "batch": 16}


@dataclass(frozen=True)
class Panel:
    """Bars in groups: for each group's label a result of each contender that has one."""

    title: str
    groups: dict[str, dict[str, Result]]

    @property
    def width(self) -> int:
        """How much room it needs, in bars; a title needs some too."""
        return max(5, sum(len(bars) for bars in self.groups.values()) + len(self.groups))


def draw(found: Sequence[Result], footnote: str, path: Path) -> list[Path]:
    """Write `path` as .png and .svg; returns the two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(panels([result for result in found if result.entry.contender != BASE]))
    bars = max((sum(panel.width for panel in row) for row in rows), default=0)
    height = _HEAD + _ROW * max(1, len(rows)) + _FOOT
    figure = Figure(figsize=(max(7.0, 0.42 * bars + 1.2), height))
    FigureCanvasAgg(figure)
    left = 0.6 / figure.get_figwidth()
    for number, row in enumerate(rows):
        top = 1 - (_HEAD + number * _ROW + 0.3) / height
        grid = figure.add_gridspec(
            1, len(row), width_ratios=[panel.width for panel in row], wspace=0.07,
            left=left, right=1 - left / 4, top=top, bottom=top - (_ROW - 0.9) / height,
        )  # fmt: skip
        for panel, axis in zip(row, grid.subplots(sharey=True, squeeze=False)[0], strict=True):
            _draw(panel, axis, first=panel is row[0])
    figure.text(left / 4, 1 - 0.1 / height, _TITLE, color=_INK, fontsize=13, weight="bold", va="top")
    figure.text(left / 4, 0.1 / height, footnote, color=_MUTED, fontsize=7.5)
    _legend(figure, found, left / 4, 1 - 0.38 / height)
    return [_save(figure, path.with_suffix(suffix)) for suffix in (".png", ".svg")]


def _rows(drawn: Sequence[Panel]) -> list[list[Panel]]:
    """Panels side by side as long as there is room."""
    rows: list[list[Panel]] = []
    for panel in drawn:
        if not rows or sum(other.width for other in rows[-1]) + panel.width > _MOST_BARS:
            rows.append([])
        rows[-1].append(panel)
    return rows


def panels(found: Sequence[Result]) -> list[Panel]:
    """What there is to compare in these results (without the base's): one panel for each question that they answer.

    Each panel varies one thing and keeps the others as in the headline, where the results have that.
    """
    engines = [result for result in found if result.entry.contender not in PEFT]
    peft = [result for result in found if result.entry.contender in PEFT]
    usual = {name: _usual(name, engines or peft) for name in _FACETS}
    adapters = str(usual["mix"])
    made = [
        Panel("Decode, adapters in the batch", _groups(_vary(engines, usual, "mix"), _mix)),
        Panel(f"Other work, {adapters}", _groups(_other_work(engines, usual), _work)),
        Panel(
            "Decode, requests at once", _groups(_vary(engines, usual, "batch"), lambda r: str(r.entry.workload.batch))
        ),
        Panel("Decode, rank", _groups(_vary(engines, usual, "rank"), lambda r: str(r.entry.rank))),
        Panel(f"PEFT, decode, {adapters}", _groups(_vary(peft, usual), lambda r: _SHORT[r.entry.contender])),
    ]
    return [
        panel for number, panel in enumerate(made) if panel.groups and (number not in (2, 3) or len(panel.groups) > 1)
    ]


def _usual(name: str, results: Iterable[Result]) -> object:
    """What the headline has, or else what most results have."""
    counts = Counter(map(_FACETS[name], results))
    return max(counts, key=lambda value: (value == _HEADLINE[name], counts[value]), default=None)


def _vary(results: Iterable[Result], usual: dict[str, object], *free: str) -> list[Result]:
    """The decode results in which everything is as usual but for what is free."""
    fixed = [name for name in usual if name not in free]
    return [
        result
        for result in results
        if result.entry.workload.kind == "decode" and all(_FACETS[name](result) == usual[name] for name in fixed)
    ]


def _other_work(results: Sequence[Result], usual: dict[str, object]) -> list[Result]:
    """Prefill and mixed work, and decode on other layers; the rank and the adapters are as usual."""
    alike = [r for r in results if all(_FACETS[name](r) == usual[name] for name in ("mix", "rank"))]
    others = [r for r in alike if r.entry.workload.kind != "decode" and r.entry.targets == usual["targets"]]
    return others + [r for r in _vary(alike, usual, "targets") if r.entry.targets != usual["targets"]]


def _groups(results: Iterable[Result], label: Label) -> dict[str, dict[str, Result]]:
    groups: dict[str, dict[str, Result]] = {}
    for result in results:
        groups.setdefault(label(result), {})[result.entry.contender] = result
    return groups


def _mix(result: Result) -> str:
    mix = result.entry.mix
    return f"base\n+ {mix.adapters}" if mix.base else str(mix.adapters)


def _work(result: Result) -> str:
    kind = result.entry.workload.kind
    return f"decode,\n{result.entry.targets}" if kind == "decode" else kind


def _draw(panel: Panel, axis: Axes, first: bool) -> None:
    """One panel's bars, with the base's line behind them."""
    ticks: list[float] = []
    left = 0.0
    for bars in panel.groups.values():
        places = [left + number * _BAR for number in range(len(bars))]
        for place, (contender, result) in zip(places, bars.items(), strict=True):
            _bar(axis, place, contender, result)
        ticks.append(sum(places) / len(places))
        left = places[-1] + _BAR + 0.34
    axis.axhline(1.0, color=_INK, linewidth=1.2, zorder=3)
    if first:
        axis.set_yticks(_TICKS, ["base" if tick == 1 else f"{tick:.1f}" for tick in _TICKS])
    axis.set_title(panel.title, fontsize=10, color=_INK, loc="left", pad=10)
    axis.set_xticks(ticks, list(panel.groups), fontsize=9, color=_INK)
    axis.set_xlim(-0.4, left - 0.34 + 0.02)
    most = max(bar.ratio.most for bars in panel.groups.values() for bar in bars.values())
    axis.set_ylim(0, max(1.08, most + 0.06, axis.get_ylim()[1]))  # the row's panels share it
    axis.grid(axis="y", color=_FAINT, linewidth=0.8, zorder=0)
    axis.tick_params(axis="both", length=0, labelcolor=_INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(_INK)


def _bar(axis: Axes, place: float, contender: str, result: Result) -> None:
    ratio = result.ratio
    inside = ratio.least > 0.15  # there is room below the whisker, where no line crosses the figure
    axis.bar(place, ratio.median, _BAR * 0.94, color=_COLOURS[contender], zorder=2)
    axis.vlines(place, ratio.least, ratio.most, color=_INK, linewidth=1, zorder=4)
    axis.annotate(
        f"{ratio.median:.2f}", (place, ratio.least if inside else ratio.most), (0, -3 if inside else 2),
        textcoords="offset points", ha="center", va="top" if inside else "bottom", fontsize=8.5, weight="bold",
        color="white" if inside else _INK, zorder=5,
    )  # fmt: skip


def _legend(figure: Figure, found: Sequence[Result], left: float, top: float) -> None:
    from matplotlib.patches import Patch

    present = {result.entry.contender for result in found}
    handles = [Patch(color=_COLOURS[name], label=text) for name, text in _LEGEND.items() if _present(name, present)]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left, top), ncols=max(1, len(handles)), frameon=False,
        fontsize=9, labelcolor=_INK, handlelength=1, handleheight=1, borderpad=0, borderaxespad=0.2,
    )  # fmt: skip


def _present(name: str, present: set[str]) -> bool:
    return bool(present & set(PEFT)) if name in PEFT else name in present


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
