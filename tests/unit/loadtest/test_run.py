"""Runs against the scripted server over a real socket: planted faults, clean runs, reports, bad input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from engine.client import AsyncClient
from loadtest.cli import app
from loadtest.commands.run import Options, execute
from loadtest.drive.case import resolved, run_case
from loadtest.drive.markers import write_marker
from loadtest.drive.site import Site, look
from loadtest.drive.targets import TargetSpec
from loadtest.errors import BadInput, Exit, TargetGone
from loadtest.plan.scenario import Case, load, shipped
from loadtest.report import document, texts
from loadtest.selftest import trials
from loadtest.selftest.server import FAULTS, Script, ScriptedServer

QUICK = {"duration": 0.6, "warmup": 0, "drain": 1, "timeout": 2, "prompt": 4, "output": 8}


@pytest.mark.slow
async def test_every_planted_fault_is_found(scripted: ScriptedServer) -> None:
    """Each kind of fault, planted once in a server of its own, is found and named."""
    async with trials.site(scripted) as one:
        references = one.references

    async def plant(number: int, fault: str) -> str:
        server = ScriptedServer(Script())
        await server.start()
        try:
            async with trials.site(server, references) as found:
                result = await trials.trial(found, server, fault, number, arrival="constant:30")
            return "" if trials.seen(fault, result) else f"{fault}: {dict(result.correctness.counts)}"
        finally:
            await server.stop()

    for some in (FAULTS[:9], FAULTS[9:]):
        assert not list(
            filter(None, await asyncio.gather(*(plant(number, fault) for number, fault in enumerate(some))))
        )


async def test_clean_run(scripted: ScriptedServer) -> None:
    """A server without faults raises no alarm, and every pair of adapters can be told apart."""
    async with trials.site(scripted) as found:
        result = await trials.trial(found, scripted, "", 1, duration=0.4)
        assert trials.alarms(result) == []
        assert result.correctness.canaries["match"] > 5
        assert found.references is not None
        assert found.references.power == 1.0


async def test_percentiles_are_the_servers(scripted: ScriptedServer) -> None:
    """Reported TTFT, TPOT and E2E are what the server sent, with five tokens in a message; none lies before that.

    A busy machine makes one reading late, a wrong reading is wrong each time: one of five has to be true.
    """
    async with trials.site(scripted) as found:
        for _ in range(5):
            reported = await trials.true_percentiles(found, scripted, seconds=1.0)
            assert len(reported) == 9
            assert [name for name, seen, true in reported if "tpot" not in name and seen < true] == []
            assert all(seen < 2 * true for name, seen, true in reported if name.endswith("p50"))  # five to a message
            # The tail is for the long form: a test shares its core.
            if not trials.Outcome(percentiles=reported[:1]).untrue:
                return
    pytest.fail(f"{reported[0]}")


async def test_freeze_is_in_the_scheduled_percentiles(scripted: ScriptedServer) -> None:
    """A closed loop that stalls misses no request: what waited for its turn waited from its schedule."""
    async with trials.site(scripted) as found:
        result = await trials.trial(found, scripted, "freeze", 0)
    assert result.measures["ttft"]["p90"] > 0.2


async def test_promotion_under_load(scripted: ScriptedServer) -> None:
    """Answers follow a promotion and a rollback; an alias that did not move is a wrong version."""
    moves = [{"do": "promote", "at": 0.1, "adapter": "ada"}, {"do": "rollback", "at": 0.3, "adapter": "ada"}]
    async with trials.site(scripted) as found:
        load = trials.workload(actions=moves, duration=0.4)
        result = await run_case(found, Case(scenario="moves", name="", workload=load))
        assert [event.detail for event in result.events] == ["v1 to v2", "v2 to v1"]
        assert {one.answered_by for one in result.records if one.adapter == "ada"} == {"ada@v1", "ada@v2"}
        assert trials.alarms(result) == []
        found.aliases.moves.clear()
        found.aliases.initial["ada@current"] = "v2"
        later = await trials.trial(found, scripted, "", 2, duration=0.2)
        assert later.correctness.counts["wrong_version"] > 0
        assert later.exit is Exit.INCORRECT


@pytest.mark.parametrize(("arrival", "cancel"), [("closed:4", 0.0), ("constant:40", 0.5)])
async def test_every_request_has_a_record(scripted: ScriptedServer, arrival: str, cancel: float) -> None:
    """Whatever becomes of a request, it is written down, cancelled ones apart from failures."""
    scripted.reset(Script(ttft_s=(0.01,), gap_s=0.002))
    async with trials.site(scripted) as found:
        result = await run_case(
            found, Case(scenario="s", name="", workload=trials.workload(arrival=arrival, cancel=cancel, duration=0.3))
        )
    assert result.health.sent == result.health.due == len(result.records) > 5
    assert result.measures["failed"] == 0
    assert (result.measures["cancelled"] > 0) == (cancel > 0)


async def test_guard_makes_the_run_invalid(scripted: ScriptedServer) -> None:
    """A request that was never sent counts as failed, and the run as the client's fault."""
    scripted.reset(Script(ttft_s=(0.4,)))
    async with trials.site(scripted) as found:
        work = trials.workload(arrival="constant:50", max_inflight=2)
        result = await run_case(found, Case(scenario="s", name="", workload=work))
    assert result.health.dropped > 10
    assert result.exit is Exit.UNRESOLVED


def options(server: ScriptedServer, *names: str, workers: int = 0, **overrides: object) -> Options:
    """The command line for a scripted server."""
    return Options(
        names=list(names),
        target=f"127.0.0.1:{server.port}",
        engine="fake",
        quick=True,
        overrides=QUICK | overrides,
        workers=workers,
    )


async def test_report(scripted: ScriptedServer, tmp_path: Path) -> None:
    """A run leaves every artefact, and run.json fits its schema."""
    code = await execute(
        options(scripted, "smoke", duration=0.3, requirements={"ttft": {"p50": "1s"}}), tmp_path / "run", as_json=False
    )
    data = json.loads((tmp_path / "run" / "run.json").read_text())
    document.check(data)
    assert code == data["exit"]
    assert data["cases"][0]["measures"]["ok"] > 5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    for name in (
        "summary.md",
        "gates.junit.xml",
        "requests.parquet",
        "events.jsonl",
        "plots/latency.png",
        "tapes/smoke.parquet",
    ):
        assert (tmp_path / "run" / name).is_file()
    with pytest.raises(BadInput, match="exists"):
        await execute(options(scripted, "smoke"), tmp_path / "run", as_json=False)


@pytest.mark.slow
async def test_interrupted(scripted: ScriptedServer, tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it, leaves a report of what a client process has measured, and exit code 130."""
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest", "run", "smoke", "--target", f"127.0.0.1:{scripted.port}",
        "--set", "duration=60s", "--set", "canary=0", "--out", str(tmp_path / "run"),
        stderr=asyncio.subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job inherits deaf ears
    )  # fmt: skip
    try:
        while len(scripted.logs) < 20:
            await asyncio.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        _, said = await asyncio.wait_for(run.communicate(), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == Exit.INTERRUPTED, said
    data = json.loads((tmp_path / "run" / "run.json").read_text())
    document.check(data)
    assert data["verdict"] == "INCONCLUSIVE"
    assert data["cases"][0]["measures"]["requests"] > 0
    assert b"Traceback" not in said


async def test_capacity_of_a_slow_target(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that answers nobody in the first calibration is given a longer one; what it can do is not underestimated."""
    monkeypatch.setattr("loadtest.drive.case._CALIBRATION_S", (0.15, 0.8))
    monkeypatch.setattr("loadtest.drive.case._CALIBRATION_WARMUP_S", 0.1)
    scripted.reset(Script(ttft_s=(0.2,)))
    async with trials.site(scripted) as found:
        found.callers = 8
        case = Case(scenario="s", name="", workload=trials.workload(arrival="poisson:0.5x", output=4, timeout=5))
        resolved_case = await resolved(case, found)
    (rate,) = found.capacity.values()
    assert 10 < rate < 41  # eight callers, 0.2 s each: 40
    assert resolved_case.workload.arrival == f"poisson:{0.5 * rate:.4g}"


async def test_dying_target(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that goes away during the run ends it with exit code 5, whatever was measured before."""
    monkeypatch.setattr("loadtest.drive.site._STILL_S", 0.3)
    async with trials.site(scripted) as found:
        load = trials.workload(duration=0.2)
        run = asyncio.create_task(run_case(found, Case(scenario="s", name="", workload=load)))
        await asyncio.sleep(0.1)
        await scripted.stop()
        assert (await run).exit is Exit.UNREACHABLE


async def test_unreachable_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there is exit code 5, before anything is sent."""
    monkeypatch.setattr("engine.client.aio._POLL_S", 0.01)
    async with AsyncClient("127.0.0.1:1", retries=0) as client:
        monkeypatch.setattr(client, "wait_ready", lambda timeout_s: client.engine(timeout_s=0.3))
        with pytest.raises(TargetGone) as gone:
            await look(Site(TargetSpec(("127.0.0.1:1",), 1.0), client))
    assert gone.value.code == 5


def test_shipped_scenarios() -> None:
    """All shipped scenarios are there and valid, in both forms."""
    assert len([load(name) for name in shipped()]) == 15


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "smok"], "did you mean 'smoke'"),
        (["run", "smoke", "--set", "durration=3s"], "did you mean 'duration'"),
        (["run", "smoke", "--slo", "ttft.p99=1s"], "is no condition"),
        (["run", "chaos", "--set", "arrival=trace:none.csv", "--serve", "/nowhere"], "there is no model"),
        (["report", "/nowhere"], "holds no run"),
    ],
)
def test_bad_usage(arguments: list[str], said: str, tmp_path: Path) -> None:
    """Wrong usage is exit code 2, with what would be right."""
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "run" else []
    ended = CliRunner().invoke(app, [*arguments, *out])
    assert ended.exit_code == 2
    assert said in " ".join(ended.output.split())


def test_plan_and_scenarios() -> None:
    """`plan` tells of too few samples beforehand; `scenarios` lists all."""
    plan = CliRunner().invoke(
        app, ["plan", "steady", "--set", "requirements={ttft: {p99: 1s}}", "--set", "arrival=poisson:1"]
    )
    assert "will be INCONCLUSIVE" in plan.output
    assert "chaos" in CliRunner().invoke(app, ["scenarios"]).output


def test_infinity_is_json() -> None:
    """Infinity and nan survive as a string and null, and are shown as words."""
    assert document.clean({"a": float("inf"), "b": [float("nan")]}) == {"a": "inf", "b": [None]}
    assert (texts.number("inf", "s"), texts.number(None, "s"), texts.number(0.25, "s")) == ("inf", "none", "250 ms")


def test_markers(tmp_path: Path) -> None:
    """A marker has the template's layers at the rank asked for, whatever the template's precision, and is never the same."""
    template = Path(__file__).parents[3] / "examples" / "support" / "v1"
    write_marker(template, tmp_path / "a", seed=1, rank=4)
    write_marker(template, tmp_path / "b", seed=2, rank=4)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in one.items()} == {4}
    assert all((one[name] != other[name]).any() for name in one)
    with pytest.raises(BadInput, match="no adapter to take shapes from"):
        write_marker(tmp_path, tmp_path / "c", seed=1, rank=4)
