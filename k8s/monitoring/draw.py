"""Draw the dashboards as pictures, from what a Prometheus holds: to look at them without a Grafana.

python -m k8s.monitoring.draw http://localhost:9090 out/dashboards --minutes 15

One PNG for each dashboards/*.json, its panels where Grafana would put them. A panel without data says so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

HERE = Path(__file__).parent
_COLUMNS, _INCH = 24, 0.62  # Grafana's grid; one of its cells
_VALUES = {"$__rate_interval": "1m", "$namespace": ".*", "$pod": ".*", "$adapter": ".*", "$tenant": ".*"}
_POINTS, _THOUSAND = 180, 1000


class Series(NamedTuple):
    """A line of a chart."""

    legend: str
    times: list[datetime]
    values: list[float]


def main() -> int:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its address, such as http://localhost:9090")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--minutes", type=float, default=15, help="how far back (default: 15)")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((HERE / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        figure = _drawn(board, asked.prometheus.rstrip("/"), 60 * asked.minutes)
        made = asked.folder / f"{path.stem}.png"
        figure.savefig(made, dpi=80)
        sys.stdout.write(f"{made}\n")
    return 0


def _drawn(board: dict[str, Any], prometheus: str, seconds: float) -> Figure:
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"]) + 1
    figure = Figure((_COLUMNS * _INCH, rows * _INCH))
    FigureCanvasAgg(figure)
    figure.text(0.01, 1 - 0.6 / rows, board["title"], size=15, weight="bold", va="center")
    for panel in board["panels"]:
        at = panel["gridPos"]
        left, top = at["x"] / _COLUMNS, 1 - (at["y"] + 1) / rows
        if panel["type"] == "row":
            figure.text(0.01, top - 0.5 / rows, panel["title"], size=12, va="center", color="0.35")
            continue
        box = (left + 0.035, top - (at["h"] - 1.6) / rows, at["w"] / _COLUMNS - 0.05, (at["h"] - 2.6) / rows)
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], size=10, loc="left")
        _draw(axes, panel, list(_series(panel, prometheus, seconds)))
    return figure


def _draw(axes: Axes, panel: dict[str, Any], series: list[Series]) -> None:
    said = _FORMATS.get(panel["fieldConfig"]["defaults"]["unit"], _plain)
    if not series or panel["type"] == "stat":
        axes.axis("off")
        axes.text(
            0, 0.5, said(series[0].values[-1], None) if series else "no data", size=20 if series else 9, va="center"
        )
        return
    for one in series:
        axes.plot(one.times, one.values, linewidth=1, label=one.legend)  # type: ignore[arg-type]
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(said))
    axes.xaxis.set_major_locator(AutoDateLocator(maxticks=5))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)


def _series(panel: dict[str, Any], prometheus: str, seconds: float) -> Iterator[Series]:
    """What every query of a panel gives; values that are no number are left out, as Grafana does."""
    for target in panel["targets"]:
        query = target["expr"]
        for name, value in _VALUES.items():
            query = query.replace(name, value)
        now = time.time()
        asked = {"query": query, "start": now - seconds, "end": now, "step": max(5.0, seconds / _POINTS)}
        address = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address, timeout=30) as answer:  # noqa: S310 - the developer's own Prometheus
            found = json.load(answer)["data"]["result"]
        for one in found:
            points = [(datetime.fromtimestamp(at, UTC), float(value)) for at, value in one["values"]]
            points = [(at, value) for at, value in points if math.isfinite(value)]
            if points:
                legend = re.sub(r"{{(\w+)}}", lambda name: one["metric"].get(name[1], ""), target["legendFormat"])  # noqa: B023
                yield Series(legend, *map(list, zip(*points, strict=True)))


def _plain(value: float, _: object) -> str:
    return f"{value:,.3g}" if value < _THOUSAND else f"{value:,.0f}"


_FORMATS: dict[str, Callable[[float, object], str]] = {
    "percentunit": lambda value, _: f"{100 * value:.3g} %",
    "bytes": lambda value, _: f"{value / (1 << 20):,.0f} MiB",
    "s": lambda value, _: f"{1000 * value:.3g} ms" if value < 1 else f"{value:,.3g} s",
    "reqps": lambda value, _: f"{value:,.3g}/s",
    "ops": lambda value, _: f"{value:,.3g}/s",
}

if __name__ == "__main__":
    sys.exit(main())
