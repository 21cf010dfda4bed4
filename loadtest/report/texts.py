"""The verdict in words: a table for the terminal, Markdown for a pull request, JUnit for a build server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

from rich.table import Table

STYLES = {"MEETS": "green", "DOES NOT MEET": "red", "INCONCLUSIVE": "yellow"}


MEASURES = (
    "case", "requests", "failed", "offered", "good", "tokens/s", "TTFT p50", "p90", "ITL p50", "E2E p90",
    "client lag p99", "client CPU",
)  # fmt: skip

CHECKS = ("case", "requirement", "limit", "value", "headroom", "n", "verdict")


def verdict(data: dict[str, Any]) -> str:
    """In a word or two."""
    return str(data["verdict"])


def summary(data: dict[str, Any]) -> str:
    """What was asked and what came back, in a sentence."""
    asked = {pair[0] for case in data["cases"] for pair in case["correctness"]["confusion"]}
    asked |= {name for case in data["cases"] for name in case["measures"]["per_adapter"]}
    adapters = len(asked - {"", "base"})
    counts = {key: sum(case["measures"][key] for case in data["cases"]) for key in ("requests", "failed")}
    wrong = sum(case["correctness"]["misroutes"] for case in data["cases"])
    whom = f"{adapters} adapter{'s' * (adapters != 1)}" + (" and the base" if asked & {"", "base"} else "")
    return (
        f"{counts['requests']:,} measured requests for {whom or 'nobody'}: {counts['failed']:,} failed, "
        f"{wrong:,} answered by the wrong adapter or version."
    )


def number(value: Any, unit: str) -> str:
    """A value for people."""
    if value is None:
        return "none"
    if value == "inf" or (isinstance(value, float) and math.isinf(value)):
        return "inf"
    match unit:
        case "s":
            return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
        case "share":
            return f"{value:.1%}"
        case "x":
            return f"{value:.2f}x"
        case "1/s":
            return f"{value:.2f}/s"
    return f"{value:g}"


def checks_table(data: dict[str, Any]) -> Table:
    """One line for each requirement of each case."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in CHECKS:
        table.add_column(heading, justify="left" if heading in ("case", "requirement", "verdict") else "right")
    for case in data["cases"]:
        for at, row in enumerate(check_rows(case)):
            style = STYLES.get(row[-1], "")
            table.add_row("" if at else case["name"], *row[:-1], f"[{style}]{row[-1]}[/]")
        if not case["checks"]:
            table.add_row(case["name"], "nothing required", "", "", "", "", "")
    return table


def measures_table(data: dict[str, Any]) -> Table:
    """One line for each case: what it came to."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in MEASURES:
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for case in data["cases"]:
        table.add_row(*measures_row(case))
    return table


def notes(data: dict[str, Any]) -> Iterator[str]:
    """What a reader must know beside the tables."""
    for case in data["cases"]:
        name = case["name"]
        if case["interrupted"]:
            yield f"{name}: interrupted; this is what was measured until then"
        if case["gone"]:
            yield f"{name}: {case['gone']}"
        yield from (f"{name}: INVALID: {problem}" for problem in case["client"]["problems"])
        yield from (f"{name}: the client was late: {reason}" for reason in case["client"]["late"])
        if case["growing"]:
            yield f"{name}: requests under way kept growing: the rate is above what the target can do"
        yield from (f"{name}: {one['name']}: {one['note']}" for one in case["checks"] if one["note"])
        for one in case["correctness"]["findings"][:5]:
            yield f"{name}: request {one['row']} for {one['asked']}: {one['kind']}: {one['detail']}"
        if case["replicas"]:
            yield f"{name}: {case['replicas']} replicas take {case['requirements']['rate']:g} requests/s at this load each"
        if case["cost_per_million_good_tokens"]:
            yield f"{name}: {case['cost_per_million_good_tokens']:.2f} per million good tokens"


def markdown(data: dict[str, Any]) -> str:
    """A summary for a pull request."""
    lines = [
        f"## Load test: {data['verdict']}",
        "",
        "| case | requirement | limit | value | headroom | n | verdict |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for case in data["cases"]:
        lines += [f"| {case['name']} | " + " | ".join(row) + " |" for row in check_rows(case)]
    lines += ["", *(f"- {note}" for note in notes(data)), "", f"`{' '.join(data['command'])}`", ""]
    return "\n".join(lines)


def junit(data: dict[str, Any]) -> str:
    """One test case for each requirement; INCONCLUSIVE is an error, not a failure."""
    root = ET.Element("testsuites", name="loadtest")
    for case in data["cases"]:
        suite = ET.SubElement(root, "testsuite", name=case["name"], tests=str(len(case["checks"])))
        for one in case["checks"]:
            test = ET.SubElement(suite, "testcase", classname=case["name"], name=one["name"])
            text = (
                f"limit {number(one['limit'], one['unit'])}, value {number(one['value'], one['unit'])}; {one['note']}"
            )
            if not case["valid"] or one["verdict"] == "INCONCLUSIVE":
                ET.SubElement(test, "error", message=text)
            elif one["verdict"] != "MEETS":
                ET.SubElement(test, "failure", message=text)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def check_rows(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Requirement, limit, value, headroom, samples, verdict."""
    for one in case["checks"]:
        headroom = "" if one["headroom"] is None else f"{one['headroom']:+.0%}"
        shown = "INCONCLUSIVE" if not case["valid"] and one["verdict"] == "MEETS" else one["verdict"]
        values = number(one["limit"], one["unit"]), number(one["value"], one["unit"])
        yield one["name"], *values, headroom, str(one["samples"]), shown


def measures_row(case: dict[str, Any]) -> tuple[str, ...]:
    """The cells under MEASURES."""
    found, client = case["measures"], case["client"]
    return (
        case["name"],
        str(found["requests"]),
        str(found["failed"]),
        number(found["offered_rate"], "1/s"),
        number(found["attainment"], "share"),
        f"{found['tokens_per_s']:.1f}",
        number(found["ttft"]["p50"], "s"),
        number(found["ttft"]["p90"], "s"),
        number(found["itl"]["p50"], "s"),
        number(found["e2e"]["p90"], "s"),
        f"{client['lag_p99_s'] * 1000:.1f} ms",
        f"{client['cpu']:.0%}",
    )
