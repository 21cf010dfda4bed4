"""The results as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.cluster.simulation.run import Result


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Bars of p99 TTFT (logarithmic) and hit rate, strategy by strategy, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    names = [one.strategy for one in results]
    colours = ["#2a6f97" if name == "ours" else "#b0b7bd" for name in names]
    milliseconds = [one.ttft_p99_s * 1000 for one in results]
    left.barh(names, milliseconds, color=colours)
    left.set_xscale("log")
    left.set_xlabel("p99 TTFT, ms")
    for name, value in zip(names, milliseconds, strict=True):
        left.text(value, name, f" {value:,.0f}", va="center", fontsize=8)
    left.margins(x=0.15)
    right.barh(names, [100 * one.hit_rate for one in results], color=colours)
    right.set_xlabel("requests that found their adapter loaded, %")
    right.set_xlim(0, 100)
    right.set_yticklabels([])
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
