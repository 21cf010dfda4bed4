"""Writes the whole folder of a run."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from loadtest.drive.case import Result
from loadtest.errors import BadInput
from loadtest.plan import tape
from loadtest.report import document, parquet, texts
from loadtest.report.plots import Plot, plots

_CLASSES = {"MEETS": "meets", "DOES NOT MEET": "fails", "INCONCLUSIVE": "open"}


def new_folder(path: Path) -> Path:
    """Make the folder of a run. Raises BadInput when there is something in it already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} exists", "Name another folder with --out, or remove it.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(results: list[Result], data: dict[str, Any], folder: Path) -> None:
    """Write every artefact."""
    document.write(data, folder)
    (folder / "summary.md").write_text(texts.markdown(data))
    (folder / "gates.junit.xml").write_text(texts.junit(data))
    parquet.write(results, folder / "requests.parquet")
    (folder / "tapes").mkdir()
    for result in results:
        tape.write(result.tape, folder / "tapes" / f"{result.case.title.replace('/', '-')}.parquet")
    with (folder / "events.jsonl").open("w") as file:
        for result in results:
            file.writelines(json.dumps({"case": result.case.title} | vars(event)) + "\n" for event in result.events)
    drawn = list(plots(results))
    (folder / "plots").mkdir()
    for plot in drawn:
        plot.save(folder / "plots")
    (folder / "report.html").write_text(page(data, drawn))


def page(data: dict[str, Any], drawn: list[Plot]) -> str:
    """The report as one HTML page that needs no network."""
    import jinja2

    source = (resources.files("loadtest") / "report" / "page.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return template.render(
        data=data,
        plots=drawn,
        classes=_CLASSES,
        notes=list(texts.notes(data)),
        rows=[(case["name"], row) for case in data["cases"] for row in texts.check_rows(case)],
        headings=texts.MEASURES,
        measures=[texts.measures_row(case) for case in data["cases"]],
    )
