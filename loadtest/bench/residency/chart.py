"""The chart of the cliff: throughput as adapters outgrow the slots, ours beside vLLM alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_INK, _MUTED, _FAINT = "#1f2933", "#52606d", "#d9dee4"
_LINES = {"Loraplex": "#0b7a75", "vLLM alone": "#c9713b"}
_SIDES = {"Loraplex": 7, "vLLM alone": -14}  # where a line's figures stand, in points above it
_TITLE = "Throughput with ever more adapters in the same slots, tokens a second"


def draw(lines: Mapping[str, Mapping[float, float]], footnote: str, path: Path) -> list[Path]:
    """Write `path` as .png and .svg; `lines` gives, by contender, tokens a second by adapters per slot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for name, points in lines.items():
        places = sorted(points)
        axis.plot(places, [points[at] for at in places], color=_LINES[name], marker="o", linewidth=2, label=name)
        for at in places:
            axis.annotate(
                f"{points[at]:.0f}", (at, points[at]), (0, _SIDES[name]), textcoords="offset points", ha="center", fontsize=8,
                color=_LINES[name],
            )  # fmt: skip
    ticks = sorted({at for points in lines.values() for at in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{at:g}" for at in ticks], fontsize=9, color=_INK)
    axis.minorticks_off()
    axis.axvline(1.0, color=_FAINT, linewidth=1)
    axis.set_ylim(0, 1.15 * max(max(points.values()) for points in lines.values()))
    axis.set_xlabel(f"adapters per slot\n{footnote}", fontsize=8.5, color=_MUTED)
    axis.set_title(_TITLE, fontsize=11, color=_INK, loc="left")
    axis.grid(axis="y", color=_FAINT, linewidth=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, labelcolor=_INK)
    axis.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower left")
    return [_save(figure, path.with_suffix(suffix)) for suffix in (".png", ".svg")]


def _save(figure: object, path: Path) -> Path:
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)  # type: ignore[attr-defined]
    return path
