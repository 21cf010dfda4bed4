"""A comparison in words: B beside A, the ratios with their intervals, and what was counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from loadtest.report.texts import number

_STYLES = {"better": "green", "worse": "red", "open": "yellow"}
_COUNTS = (("failed", "failed"), ("wrong answers", "misroutes"), ("lost tokens", "lost_tokens"))


def headings(data: dict[str, Any]) -> tuple[str, ...]:
    """Of the table's columns."""
    a, b = data["compare"]["sides"]
    return "case", "measure", a, b, f"{b} / {a}", "95 % interval", "B is"


def rows(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each measure of each case, then what was counted."""
    for counted in data["compare"]["counts"]:
        case = counted["case"]
        for one in data["compare"]["ratios"]:
            if one["case"] == case:
                yield (
                    case, one["measure"], _value(one["a"], one["unit"]), _value(one["b"], one["unit"]),
                    _ratio(one["ratio"]), f"{_ratio(one['low'])} to {_ratio(one['high'])}", one["verdict"],
                )  # fmt: skip
        yield from _counts(case, counted["a"], counted["b"])


def table(data: dict[str, Any]) -> Table:
    """For the terminal."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings(data):
        made.add_column(heading, justify="left" if heading in ("case", "measure", "B is") else "right")
    before = ""
    for row in rows(data):
        style = _STYLES.get(row[-1], "")
        verdict = f"[{style}]{row[-1]}[/]" if style else row[-1]
        made.add_row(row[0] if row[0] != before else "", *row[1:-1], verdict)
        before = row[0]
    return made


def notes(data: dict[str, Any]) -> Iterator[str]:
    """What a reader must know beside the table."""
    a, b = data["compare"]["sides"]
    for counted in data["compare"]["counts"]:
        for label, side in ((a, counted["a"]), (b, counted["b"])):
            yield from (f"{counted['case']}, {label}: the client was late: {reason}" for reason in side["late"][:1])
    for case in data["cases"]:
        if case["gone"]:
            yield f"{case['name']}: {case['gone']}"
        if case["interrupted"]:
            yield f"{case['name']}: interrupted"
        yield from (f"{case['name']}: INVALID: {problem}" for problem in case["client"]["problems"])
        yield from (
            f"{case['name']}: request {one['row']} for {one['asked']}: {one['kind']}: {one['detail']}"
            for one in case["correctness"]["findings"][:1]
        )


def verdict(data: dict[str, Any]) -> str:
    """In a sentence."""
    a, b = data["compare"]["sides"]
    said = {0: f"{b} is not worse than {a}", 1: f"{b} is worse than {a}", 3: f"{b} answered wrongly"}
    return said.get(data["exit"], f"whether {b} is worse than {a} is open")


def markdown(data: dict[str, Any]) -> str:
    """For a pull request."""
    titles = headings(data)
    lines = [f"## {verdict(data)}", "", f"| {' | '.join(titles)} |", "|---|---|" + "--:|" * (len(titles) - 3) + "---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(data)]
    lines += ["", *(f"- {note}" for note in notes(data)), "", f"`{' '.join(data['command'])}`", ""]
    return "\n".join(lines)


def _counts(case: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    share = [number(one["good"] / one["requests"] if one["requests"] else None, "share") for one in (a, b)]
    yield case, "good answers", *share, "", "", ""
    for name, key in _COUNTS:
        of = "canaries" if key == "misroutes" else "requests"
        values = [str(one[key]) if key == "lost_tokens" else f"{one[key]} of {one[of]}" for one in (a, b)]
        if key != "lost_tokens" or a[key] or b[key]:
            yield case, name, *values, "", "", ""


def _value(value: Any, unit: str) -> str:
    return f"{value:.1f}" if unit == "1/s" and isinstance(value, float) else number(value, unit)


def _ratio(value: Any) -> str:
    return "none" if value is None else value if value == "inf" else f"{value:.2f}"
