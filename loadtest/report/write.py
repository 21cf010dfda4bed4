"""Writes the whole folder of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from loadtest.drive.case import Result
from loadtest.errors import BadInput
from loadtest.plan import tape
from loadtest.report import compared, document, parquet, searched, texts
from loadtest.report.plots import Plot, plots

_WORDS: dict[str, Any] = {"run": texts, "compare": compared, "search": searched}
_CLASSES = {"MEETS": "meets", "DOES NOT MEET": "fails", "INCONCLUSIVE": "open"}
_CLASSES |= {"better": "meets", "worse": "fails", "same": "meets"}
_LEFT = ("case", "requirement", "measure", "verdict", "B is", "why")
"""Headings of columns that hold words."""


def new_folder(path: Path) -> Path:
    """Make the folder of a run. Raises BadInput when there is something in it already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} exists", "Name another folder with --out, or remove it.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(results: list[Result], data: dict[str, Any], folder: Path, drawn: Sequence[Plot] | None = None) -> None:
    """Write every artefact; the plots are those of a run, or `drawn`."""
    document.write(data, folder)
    (folder / "summary.md").write_text(_WORDS[data["kind"]].markdown(data))
    (folder / "gates.junit.xml").write_text(texts.junit(data))
    parquet.write(results, folder / "requests.parquet")
    (folder / "tapes").mkdir()
    for result in results:
        tape.write(result.tape, folder / "tapes" / f"{result.case.title.replace('/', '-')}.parquet")
    with (folder / "events.jsonl").open("w") as file:
        for result in results:
            file.writelines(json.dumps({"case": result.case.title} | vars(event)) + "\n" for event in result.events)
    drawn = list(plots(results, data["slots"])) if drawn is None else drawn
    (folder / "plots").mkdir()
    for plot in drawn:
        plot.save(folder / "plots")
    (folder / "report.html").write_text(page(data, drawn))


@dataclass(frozen=True)
class _Table:
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    grouped: bool = True
    """Whether rows with the same first cell belong together."""


def page(data: dict[str, Any], drawn: Sequence[Plot]) -> str:
    """The report as one HTML page that needs no network."""
    import jinja2

    source = (resources.files("loadtest") / "report" / "page.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    words = _WORDS[data["kind"]]
    return template.render(
        data=data, plots=drawn, classes=_CLASSES, words=_LEFT, verdict=words.verdict(data), summary=texts.summary(data),
        notes=list(words.notes(data)), tables=list(_tables(data)),
    )  # fmt: skip


def _tables(data: dict[str, Any]) -> Iterator[_Table]:
    if data["kind"] == "compare":
        yield _Table("One beside the other", compared.headings(data), list(compared.rows(data)))
    elif data["kind"] == "search":
        yield _Table("Every rate that was tried", searched.HEADINGS, list(searched.rows(data)), grouped=False)
    else:
        rows = [(case["name"], *row) for case in data["cases"] for row in texts.check_rows(case)]
        yield _Table("Requirements", texts.CHECKS, rows)
    measured = [texts.measures_row(case) for case in data["cases"]]
    yield _Table("Measures", texts.MEASURES, measured, grouped=False)
