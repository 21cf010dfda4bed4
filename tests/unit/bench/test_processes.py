"""Contenders are processes: they are asked in turn, and one that dies is reported by name, with the end of its log."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtest.bench.adapters import contest
from loadtest.bench.adapters.contest import Conditions, Contest
from loadtest.bench.adapters.plan import BASE, OURS, PEFT, Grid, stages
from loadtest.bench.child import ContenderDied, Running, start, start_module
from loadtest.bench.memory import pss_mib

FAKE = "tests.unit.bench.fake_contender"
QUESTION = {"kind": "decode", "asks": [{"prompt": [1], "adapter": 0}]}


async def _start(scratch: Path, fate: str = "") -> Running:
    running, _ = await start_module("stock, 4 slots", FAKE, {}, {"LORAPLEX_FAKE": fate}, scratch)
    return running


async def test_a_contender_answers_and_ends_with_its_input(tmp_path: Path) -> None:
    """What it prints beside its answers goes to its log, and it is left to stop in good order."""
    running = await _start(tmp_path)
    try:
        assert (await running.ask(QUESTION))["tokens_per_s"] == 100.0
        assert running.ready_s > 0
        assert pss_mib(running.pid) > 1
    finally:
        await running.stop()
    assert running.process.returncode == 0
    assert running.log.read_text().splitlines() == ["noise on standard output", "stopped in good order"]


async def test_one_that_cannot_start_is_named(tmp_path: Path) -> None:
    """With what it said last."""
    with pytest.raises(ContenderDied, match="stock, 4 slots ended with exit code 1") as died:
        await _start(tmp_path, "dies at start")
    assert "no room for another engine" in died.value.tail


async def test_one_that_dies_on_a_question_is_named(tmp_path: Path) -> None:
    """Its traceback is in the message."""
    running = await _start(tmp_path, "dies later")
    with pytest.raises(ContenderDied, match=r"(?s)stock, 4 slots ended.*the kernel gave up"):
        await running.ask(QUESTION)
    await running.stop()


async def test_one_that_goes_silent_is_named(tmp_path: Path) -> None:
    """A hang is no reason to wait for ever."""
    running = await _start(tmp_path)
    try:
        with pytest.raises(ContenderDied, match="said nothing for 0 s"):
            await running.answer(timeout_s=0.01)
    finally:
        await running.stop()


async def test_a_stop_that_is_cancelled_still_ends_the_process(tmp_path: Path) -> None:
    """`timeout` sends its signal twice: nothing may outlive the second either."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    running = await start("vllm serve", [sys.executable, "-c", stubborn], {}, tmp_path, piped=False)
    while "up" not in running.log.read_text():
        await asyncio.sleep(0.01)
    stopping = asyncio.ensure_future(running.stop())
    await asyncio.sleep(0.05)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await asyncio.wait_for(running.process.wait(), 5) == -9


@pytest.mark.parametrize("signals", [1, 2])
def test_the_benchmark_ends_what_it_started_when_it_is_told_to_end(signals: int, tmp_path: Path) -> None:
    """By SIGTERM, once or twice; its child is gone when it is gone."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom loadtest.bench.child import run_until_signal, start\n"
        "async def work():\n"
        "    command = [sys.executable, '-c', 'import time; time.sleep(20)']\n"
        "    child = await start('child', command, {}, Path(sys.argv[1]), piped=False)\n"
        "    print(child.pid, flush=True)\n"
        "    try: await asyncio.sleep(60)\n"
        "    finally: await child.stop()\n"
        "run_until_signal(work())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as bench:
        child = int((bench.stdout or sys.stdin.buffer).readline())
        for _ in range(signals):
            bench.send_signal(signal.SIGTERM)
        for _ in range(100):
            if not psutil.pid_exists(child):
                break
            time.sleep(0.05)
        bench.kill()
    assert not psutil.pid_exists(child)


async def test_a_contest_asks_everybody_the_same_round_by_round(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two counted rounds of each, the same prompts for all of a round, the adapters in turn, and everything is stopped."""
    started: list[Running] = []

    async def fake(name: str, _: str, *rest: object) -> tuple[Running, dict[str, object]]:
        running, facts = await start_module(name, FAKE, *rest)  # type: ignore[arg-type]
        started.append(running)
        return running, facts

    monkeypatch.setattr(contest, "start_module", fake)
    race = Contest(Conditions(base, vocabulary=50, rounds=2), tmp_path)
    await race.run(stages([Grid((OURS, PEFT[0]), ("decode",), batches=(8,))], (4,), 16))
    found = {entry.contender: replies for entry, replies in race.measured.items()}
    assert [len(replies) for replies in found.values()] == [2, 2, 2]
    for number in range(2):
        prompts = found[BASE][number]["prompts"]
        assert found[OURS][number]["prompts"] == prompts
        assert found["peft-one"][number]["prompts"] == prompts[:2]  # one at a time, two tell the rate
    assert found[BASE][0]["prompts"] != found[BASE][1]["prompts"]
    assert found[OURS][0]["base_tokens_per_s"] == 100.0
    assert found[OURS][0]["owners"] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [running.process.returncode for running in started] == [0, 0, 0]


async def test_whoever_still_runs_is_stopped_when_another_dies(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the benchmark started outlives it."""
    started: list[Running] = []

    async def fake(name: str, _: str, arguments: dict[str, object], *__: object) -> tuple[Running, dict[str, object]]:
        fate = "dies later" if name.startswith(OURS) else ""
        running, facts = await start_module(name, FAKE, arguments, {"LORAPLEX_FAKE": fate}, tmp_path)
        started.append(running)
        return running, facts

    monkeypatch.setattr(contest, "start_module", fake)
    race = Contest(Conditions(base, vocabulary=50, rounds=1), tmp_path)
    with pytest.raises(ContenderDied, match="ours, 4 slots"):
        await race.run(stages([Grid((OURS,), ("decode",))], (4,), 16))
    await asyncio.sleep(0)
    assert all(running.process.returncode is not None for running in started)
