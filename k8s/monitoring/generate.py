"""Write Grafana's dashboards and Prometheus' rules from panels.py and alerts.py.

python -m k8s.monitoring.generate            # write dashboards/*.json and rules.yaml
python -m k8s.monitoring.generate --check    # exit code 1 if they are not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh, VariableSort

from k8s.monitoring.alerts import ALERTS, Alert
from k8s.monitoring.panels import BOARDS, Board, Panel

HERE = Path(__file__).parent
RUNBOOKS = "https://docs.example.com/loraplex/runbooks"  # where you publish docs/runbooks
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def main() -> int:
    """Write, or check with --check."""
    wanted = dict(files())
    kept = {path for path in (HERE / "dashboards").glob("*.json") if path not in wanted}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        for path in (*stale, *kept):
            sys.stderr.write(f"{path.relative_to(HERE)} is not fresh: run python -m k8s.monitoring.generate\n")
        return bool(stale or kept)
    for path in kept:
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


def files() -> Iterator[tuple[Path, str]]:
    """What there is to be, by where."""
    for board in BOARDS:
        made = JSONEncoder(sort_keys=True, indent=1, ensure_ascii=False).encode(_dashboard(board).build())
        yield HERE / "dashboards" / f"{board.uid}.json", made + "\n"
    text = "# Made by generate.py from alerts.py; not to be edited.\n"
    yield HERE / "rules.yaml", text + yaml.safe_dump(_rules(), sort_keys=False, width=10_000)


def _dashboard(board: Board) -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["loraplex"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .editable()
        .link(
            dashboard.DashboardLink("Loraplex").tags(["loraplex"]).as_dropdown(True).keep_time(True).include_vars(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Source").type("prometheus"))
    )
    chosen = {
        "namespace": "label_values(process_start_time_seconds, namespace)",
        "pod": 'label_values(process_start_time_seconds{namespace=~"$namespace"}, pod)',
    }
    for name, query in (chosen | board.variables).items():
        made = made.with_variable(_variable(name, query))
    for title, panels in board.rows.items():
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_stat(panel) if panel.kind == "stat" else _chart(panel))
    return made


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .multi(True)
        .all_value(".*")
    )


def _queries(panel: Panel) -> Iterator[prometheus.Dataquery]:
    for letter, (legend, query) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        yield prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend).datasource(_SOURCE)


def _chart(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .min(0)
        .span(panel.span)
        .height(8)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 8)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for query in _queries(panel):
        made = made.with_target(query)
    return made


def _stat(panel: Panel) -> stat.Panel:
    made = (
        stat.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .span(panel.span)
        .height(4)
        .color_mode(BigValueColorMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    for query in _queries(panel):
        made = made.with_target(query)
    return made


def _rules() -> dict[str, object]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "loraplex", "labels": {"app.kubernetes.io/name": "loraplex"}},
        "spec": {"groups": [{"name": "loraplex", "rules": [_rule(alert) for alert in ALERTS]}]},
    }


def _rule(alert: Alert) -> dict[str, object]:
    return {
        "alert": alert.name,
        "expr": alert.query,
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook_url": f"{RUNBOOKS}/{alert.name}.md"},
    }


if __name__ == "__main__":
    sys.exit(main())
