"""Results for people and for programs: tables, adapters.json, and the chart beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.bench import output
from loadtest.bench.adapters.chart import draw
from loadtest.bench.adapters.plan import BASE, OURS, Entry
from loadtest.bench.adapters.results import Result, Spread, against

NAMES = {
    "peft-one": "PEFT, one request at a time",
    "peft-grouped": "PEFT, grouped by adapter",
    "peft-mixed": "PEFT, adapter_names",
}


def tables(found: Sequence[Result]) -> Iterator[RenderableType]:
    """A table for each workload, each contender's line in it; then what ours comes to against the others."""
    groups: dict[str, list[Result]] = {}
    for result in found:
        groups.setdefault(_title(result.entry), []).append(result)
    for title, results in groups.items():
        yield _table(title, results)
    yield from _summary(found)


def _title(entry: Entry) -> str:
    workload = entry.workload
    return f"{workload.kind}, {workload.batch} requests, rank {entry.rank} on {entry.targets} layers"


def _table(title: str, results: Sequence[Result]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    for heading in ("contender", "adapters", "slots"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "min - max", "of base", "min - max", "ITL p50", "ITL p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        entry = result.entry
        table.add_row(
            NAMES.get(entry.contender, entry.contender),
            "" if entry.contender == BASE else str(entry.mix).replace(" adapters", "").replace(" adapter", ""),
            str(entry.slots or ""),
            f"{result.rate.median:.0f}",
            f"{result.rate.least:.0f} - {result.rate.most:.0f}",
            f"{result.ratio.median:.3f}",
            "" if entry.contender == BASE else f"{result.ratio.least:.3f} - {result.ratio.most:.3f}",
            f"{result.itl_p50_ms:.1f} ms" if result.itl_p50_ms else "",
            f"{result.itl_p99_ms:.1f} ms" if result.itl_p99_ms else "",
            style="bold" if entry.contender == OURS else None,
        )
    return table


def _summary(found: Sequence[Result]) -> Iterator[Text]:
    """One line for each of our results that somebody else has too."""
    for ours in (result for result in found if result.entry.contender == OURS):
        if others := against(found, ours):
            compared = ", ".join(f"{spread.median:.2f} x {NAMES.get(name, name)}" for name, spread in others.items())
            yield Text(f"{_title(ours.entry)}, {ours.entry.mix}: ours is {ours.ratio.median:.2f} x base, {compared}")


def to_json(found: Sequence[Result], about: dict[str, Any]) -> dict[str, Any]:
    """Everything: what it was measured on, every line with every round, and ours against the others."""
    return {
        **about,
        "results": [result.to_json() for result in found],
        "ours_against": [
            {"workload": _title(ours.entry), "adapters": str(ours.entry.mix), **_medians(against(found, ours))}
            for ours in found
            if ours.entry.contender == OURS
        ],
    }


def _medians(spreads: dict[str, Spread]) -> dict[str, float]:
    return {name: spread.median for name, spread in spreads.items()}


def write(found: Sequence[Result], about: dict[str, Any], folder: Path) -> list[Path]:
    """Write adapters.json, adapters.png and adapters.svg into `folder`, made if need be; returns their paths."""
    data = output.save(to_json(found, about), folder / "adapters.json")
    machine = about["machine"]
    subtitle = f"{machine['cpu']}, {machine['cores']} cores" if about["device"] == "cpu" else about["device_name"]
    footnote = (
        f"{about['model']}, {about['dtype']}, vLLM {about['vllm']}, {subtitle}; bars: median, whiskers: least and most"
    )
    return [data, *draw(found, footnote, folder / "adapters")]
