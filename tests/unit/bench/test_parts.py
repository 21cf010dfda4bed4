"""The command line of the benchmark, and the arithmetic of its smaller parts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from loadtest.bench.__main__ import app
from loadtest.bench.adapters.command import mix_of
from loadtest.bench.adapters.workloads import Mix
from loadtest.bench.machine import machine
from loadtest.bench.memory import Cost, table, to_json
from loadtest.bench.profile import OUTSIDE, read_trace, summarize
from loadtest.bench.profile import table as profile_table

PARTS = (
    "adapters",
    "frontend",
    "identity",
    "memory",
    "profile",
    "residency",
    "eviction",
    "router",
    "affinity",
    "tuning",
    "client",
    "endurance",
    "all",
)
COMMAND: Any = get_command(app)


@pytest.mark.parametrize("part", PARTS)
def test_help_of_every_part_gives_examples(part: str) -> None:
    """In lines that an 80-column terminal does not break."""
    shown = CliRunner().invoke(app, [part, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert shown.output.count(f'make bench ARGS="{part}') >= 1
    _, _, rest = (COMMAND.commands[part].help or "").partition("\n\n")
    assert [line for line in rest.splitlines() if len(line) > 78] == []


def test_help_names_the_parts() -> None:
    """All of them."""
    assert list(COMMAND.commands) == list(PARTS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workloads", "sleep"], "choose from decode, prefill, mixed"),
        (["--contenders", "tgi"], "choose from base, ours, stock"),
        (["--adapters", "four"], "whole number"),
        (["--adapters", "base+0"], "whole number"),
        (["--ranks", "1024"], "largest rank, 512"),
        (["--batches", ","], "at least one value"),
        (["--slots", "4,-1"], "whole number"),
        (["--full", "--ranks", "8"], "leave it out"),
        (["--model", "nowhere"], "nowhere"),
        (["--rounds", "0"], "--rounds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_anything_starts(words: list[str], says: str, base: Path) -> None:
    """With what would be right, and exit code 2."""
    model = [] if "--model" in words else ["--model", str(base)]
    shown = CliRunner().invoke(app, ["adapters", *model, *words], env={"COLUMNS": "200"})
    assert shown.exit_code == 2
    assert says in shown.output


def test_adapters_are_counted_with_and_without_the_base() -> None:
    """As the option is written."""
    assert (mix_of("4"), mix_of("base+4")) == (Mix(4), Mix(4, base=True))


def test_the_machine_says_what_it_is() -> None:
    """In values that JSON has."""
    facts = machine()
    assert facts["cores"] >= 1  # type: ignore[operator]
    assert facts["cpu"]
    assert json.loads(json.dumps(facts)) == facts


def test_slots_are_charged_above_the_engine_without_any() -> None:
    """In all, and for each adapter."""
    base, eight = Cost(0, 0, 25.0, 2000.0, 2010.0, 1000), Cost(8, 16, 27.0, 2100.0, 2210.0, 1000)
    data = to_json([base, eight], {"model": "tiny"})
    assert data["costs"][1]["above_base"] == {
        "start_s": 2.0, "started_mib": 100.0, "full_mib": 200.0, "per_adapter_mib": 25.0,
    }  # fmt: skip
    assert table([base, eight]).row_count == 2


def _span(name: str, begin: float, lasted: float, category: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": lasted, "tid": thread}


DECODE = "execute_context_0(0)_generation_16(16)"
TRACE = [
    _span("execute_context_2(512)_generation_0(0)", 0, 500, "user_annotation"),
    _span("aten::mm", 10, 400),
    _span(DECODE, 1000, 1000, "user_annotation"),
    _span("aten::linear", 1100, 600),
    _span("aten::mm", 1200, 400),
    _span("aten::add", 1800, 100),
    _span(DECODE, 3000, 1000, "user_annotation"),
    _span("aten::linear", 3100, 600),
    _span("aten::mm", 3200, 200),
    _span("aten::mm", 3400, 200),
    _span("aten::add", 3800, 100),
    _span("aten::mm", 3100, 900, thread=2),
    {"ph": "i", "name": "a mark", "ts": 1},
]


def test_a_profile_gives_each_operator_its_own_time_in_a_decode_step() -> None:
    """Without what it calls, without prefill and other threads; the rest of the step is Python."""
    found = summarize(TRACE, unwatched_ms=0.8)
    assert (found.steps, found.step_ms) == (2, 1.0)
    own = {name: (operator.calls, pytest.approx(operator.self_ms)) for name, operator in found.operators.items()}
    assert own == {"aten::linear": (1, 0.2), "aten::mm": (1.5, 0.4), "aten::add": (1, 0.1), OUTSIDE: (0, 0.3)}
    assert profile_table({"base": found, "ours": found}, top=3).row_count == 5


def test_on_a_gpu_kernels_are_what_counts() -> None:
    """Operators there only launch them."""
    found = summarize([*TRACE, _span("gemm", 1250, 300, "kernel", 7)], unwatched_ms=0.8)
    assert set(found.operators) == {"gemm", OUTSIDE}


def test_a_trace_without_decode_steps_is_refused(tmp_path: Path) -> None:
    """So is a folder without a trace."""
    with pytest.raises(FileNotFoundError, match="no trace"):
        read_trace(tmp_path)
    with gzip.open(tmp_path / "rank0.pt.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": TRACE[:2]}, file)
    with pytest.raises(ValueError, match="no decode step"):
        summarize(read_trace(tmp_path), 1.0)
