"""Medians, ratios, tables, files: from what was measured to what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest.bench.adapters.chart import panels
from loadtest.bench.adapters.plan import FULL, HEADLINE, OURS, Grid, stages
from loadtest.bench.adapters.report import tables, write
from loadtest.bench.adapters.results import Spread, against, ratios, results
from loadtest.bench.adapters.workloads import Mix
from tests.unit.bench.samples import made_up

ABOUT: dict[str, Any] = {
    "machine": {"cpu": "a CPU", "cores": 2, "commit": "abc"},
    "model": "tiny", "dtype": "bfloat16", "vllm": "0.32.0", "device": "cpu", "device_name": "cpu",
}  # fmt: skip


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down for a round slows both: the median of ratios does not see it."""
    spread = ratios([90.0, 45.0, 99.0], [100.0, 50.0, 110.0])
    assert spread == Spread(pytest.approx(0.9), pytest.approx(0.9), pytest.approx(0.9), pytest.approx([0.9, 0.9, 0.9]))


def test_a_spread_has_median_and_extremes() -> None:
    """Of an even number of rounds too."""
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(2.0, 1.0, 4.0, [4.0, 1.0, 2.0])
    assert Spread.of([4.0, 1.0]).median == 2.5


def test_each_reply_is_compared_with_the_base_beside_it() -> None:
    """Not with the base of another round, when the machine was slower."""
    (stage,) = stages([Grid((OURS,), ("decode",))], (4,), 16)
    latencies = {"ttft_p50_ms": 0.0, "itl_p50_ms": 0.0, "itl_p99_ms": 0.0}
    replies = [{"tokens_per_s": 90.0, "base_tokens_per_s": 100.0}, {"tokens_per_s": 20.0, "base_tokens_per_s": 25.0}]
    (found,) = results({stage.entries[1]: [reply | latencies for reply in replies]})
    assert found.ratio.rounds == pytest.approx([0.9, 0.8])
    assert found.rate.rounds == [90.0, 20.0]


def test_ours_is_compared_with_everybody_who_did_the_same() -> None:
    """Stock and PEFT with as many adapters; neither the base nor another mix."""
    found = made_up(HEADLINE)
    ours = next(r for r in found if r.entry.contender == OURS and r.entry.mix == Mix(4))
    others = against(found, ours)
    assert set(others) == {"stock", "peft-one", "peft-grouped", "peft-mixed"}
    assert others["stock"].median == pytest.approx(1.8, rel=0.1)


def test_the_table_shows_every_line() -> None:
    """With its ratio, and the summary below it."""
    console = Console(width=140)
    with console.capture() as shown:
        for item in tables(made_up(HEADLINE)):
            console.print(item)
    text = shown.get()
    assert text.count("\n") > 25
    assert "decode, 16 requests, rank 16 on all-linear layers" in text
    assert "PEFT, one request at a time" in text
    assert "x base" in text


@pytest.mark.parametrize("grids", [HEADLINE, FULL[-1:], [Grid(kinds=("prefill",))]], ids=["headline", "peft", "one"])
def test_a_report_has_its_json_and_a_chart(grids: Any, tmp_path: Path) -> None:
    """The picture is a picture, in both formats, whatever was measured."""
    found = made_up(grids)
    data, png, svg = write(found, ABOUT, tmp_path / "new" / "folder")
    read = json.loads(data.read_text())
    assert read["machine"]["cores"] == 2
    assert len(read["results"]) == len(found)
    assert len(read["results"][0]["tokens_per_s"]["rounds"]) == 3
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000
    assert "</svg>" in svg.read_text()


def test_the_chart_answers_each_question_in_a_panel() -> None:
    """Adapters, other work and PEFT in the headline; requests and ranks where they vary."""
    headline = panels([r for r in made_up(HEADLINE) if r.entry.contender != "base"])
    assert [list(panel.groups) for panel in headline] == [
        ["1", "4", "8", "16", "base\n+ 4"],
        ["prefill", "mixed", "decode,\nall-linear"],
        ["one at\na time", "grouped", "adapter_\nnames"],
    ]
    full = panels([r for r in made_up(FULL) if r.entry.contender != "base"])
    assert [panel.title.split(",")[1] for panel in full if panel.title.startswith("Decode")] == [
        " adapters in the batch", " requests at once", " rank",
    ]  # fmt: skip
