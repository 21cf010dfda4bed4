"""Dashboards and alerts ask for what the code exports, and are what their description says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from k8s.monitoring.alerts import ALERTS
from k8s.monitoring.generate import files
from k8s.monitoring.panels import BOARDS
from tests.unit.k8s.exported import exported, selectors
from tests.unit.k8s.manifests import K8S, ROOT, of_kind, rendered, workloads

OF_TARGET = {"namespace", "pod", "job", "instance"}  # what Prometheus adds to every series
_VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$pod": ".*", "$adapter": ".*", "$tenant": ".*"}
_FIXTURES = {"loraplex_server"}
DASHBOARDS = sorted((K8S / "monitoring" / "dashboards").glob("*.json"))


def queries() -> Iterator[tuple[str, str]]:
    """Every query, where it stands, and its text without Grafana's variables."""
    for board in BOARDS:
        for panel in (panel for panels in board.rows.values() for panel in panels):
            for query in panel.queries.values():
                yield f"{board.uid}: {panel.title}", plain(query)
    for alert in ALERTS:
        yield alert.name, alert.query


def plain(query: str) -> str:
    """A query as Prometheus gets it."""
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def known() -> dict[str, set[str]]:
    """Every metric and its labels: what our pages show, and what vLLM's source names."""
    return exported() | _of_vllm()


def _of_vllm() -> dict[str, set[str]]:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    found: dict[str, set[str]] = {}
    for name in re.findall(r'name="(vllm:\w+)"', source):
        for suffix in ("", "_total", "_bucket", "_sum", "_count"):
            found[name + suffix] = {"model_name", "engine"} | ({"le"} if suffix == "_bucket" else set())
    return found


def test_the_files_are_fresh() -> None:
    """What is checked in is what generate.py would write, and nothing else is there."""
    wanted = dict(files())
    assert {path.name: path.read_text() == text for path, text in wanted.items()} == dict.fromkeys(
        (path.name for path in wanted), True
    )
    assert set(DASHBOARDS) == {path for path in wanted if path.suffix == ".json"}


def test_every_query_asks_for_metrics_that_exist() -> None:
    """By their names and labels; a query that cannot be parsed fails, too."""
    metrics = known()
    for where, query in queries():
        asked = list(selectors(promql_parser.parse(query)))
        assert asked, where
        for name, labels in asked:
            assert name in metrics, f"{where}: {name}"
            assert labels <= metrics[name] | OF_TARGET, f"{where}: {name} has no {labels - metrics[name] - OF_TARGET}"


@pytest.mark.parametrize(
    "query",
    [
        "sum(rate(loraplex_call_total[5m]))",
        "sum by (tenant) (rate(loraplex_calls_total[5m]))",
        'loraplex_adapter_found_total{adapter="a"}',
        "histogram_quantile(0.9, sum by (le) (rate(loraplex_waiting_bucket[5m])))",
    ],
)
def test_a_query_for_what_is_not_there_is_found(query: str) -> None:
    """A misspelt name, a label of another metric, a histogram that is none."""
    metrics = exported()
    asked = selectors(promql_parser.parse(query))
    assert not all(name in metrics and labels <= metrics[name] | OF_TARGET for name, labels in asked)


def test_everything_we_export_is_on_a_dashboard() -> None:
    """A metric that nobody looks at is a cost without a use."""
    shown = {name for _, query in queries() for name, _ in selectors(promql_parser.parse(query))}
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in exported() if name.startswith("loraplex_")}
    missing = {family for family in families if not any(name.startswith(family) for name in shown)}
    assert missing <= {"loraplex_router_replica_running", "loraplex_router_replica_adapters"}


def test_legends_name_labels_that_the_query_keeps() -> None:
    """`{{tenant}}` behind a sum over all tenants would be empty."""
    for board in BOARDS:
        for panel in (panel for panels in board.rows.values() for panel in panels):
            for legend, query in panel.queries.items():
                for label in re.findall(r"{{(\w+)}}", legend):
                    grouped = {g.strip() for by in re.findall(r"by \(([^)]*)\)", query) for g in by.split(",")}
                    assert label in (grouped or {"pod"}), f"{panel.title}: {label}"


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_is_whole(file: Path) -> None:
    """Every panel lies in the grid beside the others, has its source, and a variable that is used is defined."""
    board: Any = json.loads(file.read_text())
    variables = {one["name"] for one in board["templating"]["list"]}
    assert {"datasource", "namespace", "pod"} <= variables
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    """Named alike; a runbook says what it means, how to look, and what to do."""
    folder = ROOT / "docs" / "runbooks"
    assert {file.stem for file in folder.glob("*.md")} - {"README"} == {alert.name for alert in ALERTS}
    for alert in ALERTS:
        text = (folder / f"{alert.name}.md").read_text()
        for heading in ("## What it means", "## Look", "## Do"):
            assert heading in text, alert.name
        names = {re.sub(r"[{\[].*", "", name) for name in re.findall(r"`((?:loraplex|vllm|process)[_:][a-z_:]+)", text)}
        assert names <= {re.sub(r"_(bucket|sum|count)$", "", name) for name in known()} | known().keys(), alert.name


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.stem
)
def test_metrics_in_the_docs_exist(page: Path) -> None:
    """Whole names, or beginnings with a star."""
    names = set(exported()) | {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in exported()}
    for name, star in re.findall(r"`(loraplex_[a-z_]+)(\*?)`", page.read_text()):
        found = any(one.startswith(name) for one in names) if star else name in names or name in _FIXTURES
        assert found, name


@pytest.mark.parametrize("overlay", ["monitoring", "mtls"])
def test_prometheus_finds_the_pods(overlay: str) -> None:
    """By their labels and the port's name, on the path that has the metrics, with TLS where the server has it."""
    documents = rendered(overlay)
    (monitor,) = of_kind(documents, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    found = [one for one in workloads(documents) if wanted.items() <= one.labels.items()]
    assert len(found) == 2
    for workload in found:
        ports = {port["name"] for container in workload.pod["containers"] for port in container["ports"]}
        assert endpoint["port"] in ports
        probe = workload.pod["containers"][0]["readinessProbe"]["httpGet"]
        assert endpoint.get("scheme", "http") == probe.get("scheme", "HTTP").lower()
    assert endpoint["path"] == "/metrics"
