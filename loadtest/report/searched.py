"""A search in words: the curve as a table, and what it means for whoever has to serve a rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from loadtest.report.texts import STYLES, number

HEADINGS = ("rate", "requests", "good", "good/s", "TTFT p50", "p95", "TPOT p50", "verdict", "why")


def rows(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each probe, by rate."""
    for one in data["search"]["probes"]:
        latencies = one["ttft"] or {}, one["tpot"] or {}
        yield (
            f"{one['rate']:g}", str(one["requests"]), number(one["attainment"], "share"), number(one["goodput"], "1/s"),
            number(latencies[0].get("p50"), "s"), number(latencies[0].get("p95"), "s"),
            number(latencies[1].get("p50"), "s"), one["verdict"], one["reason"],
        )  # fmt: skip


def table(data: dict[str, Any]) -> Table:
    """For the terminal."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading in ("verdict", "why") else "right")
    for row in rows(data):
        made.add_row(*row[:-2], f"[{STYLES.get(row[-2], '')}]{row[-2]}[/]", row[-1])
    return made


def notes(data: dict[str, Any]) -> Iterator[str]:
    """What follows from it."""
    found = data["search"]
    if found["limiting"]:
        yield f"from there on it is the {found['limiting']} that grows"
    if found["replicas"]:
        yield f"{found['wanted']:g} requests/s take {found['replicas']} replicas, at {found['best']:g}/s each"
    for case in data["cases"]:
        if case["gone"]:
            yield f"{case['name']}: {case['gone']}"
        yield from (
            f"{case['name']}: request {one['row']} for {one['asked']}: {one['kind']}: {one['detail']}"
            for one in case["correctness"]["findings"][:1]
        )


def verdict(data: dict[str, Any]) -> str:
    """In a sentence."""
    found, unit = data["search"], data["search"]["unit"]
    if data["exit"] == 3:
        return "DOES NOT MEET: a wrong answer ended the search"
    if not found["best"]:
        return f"no rate was shown to meet the requirements: {found['ended']}"
    above = f"; {found['above']:g} does not" if found["above"] else "; nothing above it was tried"
    shown = f"{found['best']:g} {unit} meet the requirements ({found['confirmed']} runs){above}"
    return shown if data["exit"] == 0 else f"{shown}; INCONCLUSIVE: {found['ended']}"


def markdown(data: dict[str, Any]) -> str:
    """For a pull request."""
    lines = [f"## {verdict(data)}", "", f"| {' | '.join(HEADINGS)} |", "|" + "--:|" * 7 + "---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(data)]
    lines += ["", *(f"- {note}" for note in notes(data)), "", f"`{' '.join(data['command'])}`", ""]
    return "\n".join(lines)
