"""Comparisons: the ratios' statistics, two scripted servers in turns, and a scripted OpenAI server as a peer."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from loadtest.commands.compare import CompareOptions, execute
from loadtest.drive.case import run_case
from loadtest.drive.openers import remote
from loadtest.drive.records import Record, Status
from loadtest.drive.site import take_references
from loadtest.errors import BadInput, Exit
from loadtest.judge import paired
from loadtest.judge.paired import Difference, Round
from loadtest.plan.scenario import Case
from loadtest.report import compared, document
from loadtest.selftest import trials
from loadtest.selftest.server import Script, ScriptedServer, tokens

QUICK = {
    "duration": 0.2, "warmup": 0, "drain": 1, "timeout": 2, "prompt": 4, "output": 4, "canary": 0,
    "arrival": "constant:25",
}  # fmt: skip


def records(ttfts: list[float]) -> list[Record]:
    """Answers of two tokens with these TTFT, one a second; inf is a failure."""
    made = []
    for row, ttft in enumerate(ttfts):
        one = Record(row, "ada", float(row), sent=float(row), status=Status.OK)
        if np.isfinite(ttft):
            one.times, one.counts = array("d", [row + ttft, row + ttft + 0.1]), array("i", [1, 1])
            one.ended = one.times[-1]
        else:
            one.status = Status.ERROR
        made.append(one)
    return made


def found(a: list[float], b: list[float], rounds: int = 4) -> dict[str, paired.Ratio]:
    """The ratios by measure."""
    pairs = [Round(records(a), records(b), (0.0, 0.0)) for _ in range(rounds)]
    return {one.measure: one for one in paired.ratios("c", pairs, (0.0, float(len(a))), 0.1)}


def test_ratio_and_its_interval() -> None:
    """Twice as slow is a ratio of 2, whose interval holds it and is past the tolerance."""
    a = list(np.random.default_rng(0).uniform(0.1, 0.3, 200))
    twice = found(a, [2 * value for value in a])["TTFT p50"]
    assert twice.ratio == pytest.approx(2.0)
    assert twice.low < 2.0 < twice.high
    assert twice.verdict is Difference.WORSE
    assert found([2 * value for value in a], a)["TTFT p50"].verdict is Difference.BETTER
    assert found(a, a)["TTFT p50"].verdict is Difference.SAME


def test_noise_is_left_open_and_two_rounds_prove_nothing() -> None:
    """A difference within the noise of few requests is neither, and two pairs of rounds are too few for any verdict."""
    rng = np.random.default_rng(1)
    pairs = [
        Round(records(list(rng.exponential(0.2, 9))), records(list(rng.exponential(0.2, 9))), (0.0, 0.0)) for _ in "abc"
    ]
    few = next(paired.ratios("c", pairs, (0.0, 9.0), 0.1))
    assert few.verdict is Difference.OPEN
    assert found([0.1] * 50, [0.3] * 50, rounds=2)["TTFT p50"].verdict is Difference.OPEN


def test_intervals_hold_the_truth() -> None:
    """Of forty comparisons of equal servers, the 95 % interval misses 1 in few."""
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(40):
        pairs = [(rng.exponential(1.0, 60), rng.exponential(1.0, 60)) for _ in range(3)]
        low, high = paired.bootstrap(pairs, paired.quantile(0.5))
        missed += not low <= 1 <= high
    assert missed <= 8


def test_failures_are_infinitely_slow_on_either_side() -> None:
    """A side that fails most requests has no finite p95: the other is infinitely better, and neither is hidden."""
    failing = [0.1, np.inf] * 40
    assert found([0.1] * 80, failing)["TTFT p95"].ratio == np.inf
    assert found(failing, [0.1] * 80)["TTFT p95"].ratio == 0.0
    assert np.isnan(found(failing, failing)["TTFT p95"].ratio)
    assert found([0.1] * 80, failing)["tokens/s"].verdict is Difference.WORSE


def options(targets: list[str], **changes: Any) -> CompareOptions:
    """The command line for two servers that are there."""
    overrides = QUICK | changes.pop("overrides", {})
    return CompareOptions(
        names=["steady"],
        targets=targets,
        serve=None,
        adapters=[],
        engine="fake",
        peer="",
        model="",
        quick=True,
        overrides=overrides,
        workers=0,
        rounds=changes.pop("rounds", 3),
        tolerance=0.1,
    )


@pytest.mark.slow
async def test_compare(scripted: ScriptedServer, tmp_path: Path) -> None:
    """A slower server is found to be worse, in a report that fits its schema; a wrong answer of B outranks that."""
    slow = ScriptedServer(Script(ttft_s=(0.25,)))
    await slow.start()
    try:
        targets = [f"127.0.0.1:{server.port}" for server in (scripted, slow)]
        assert await execute(options(targets), tmp_path / "a", as_json=False) is Exit.MISSED
        data = json.loads((tmp_path / "a" / "run.json").read_text())
        document.check(data)
        (ttft,) = [one for one in data["compare"]["ratios"] if one["measure"] == "TTFT p50"]
        assert ttft["low"] > 1.1
        assert len({case["tape"]["sha256"] for case in data["cases"]}) == 3  # one tape for each pair of rounds
        assert "TTFT p50" in (tmp_path / "a" / "summary.md").read_text()
        assert (tmp_path / "a" / "plots" / "ratios.png").is_file()
        slow.reset(Script(fault="wrong_adapter"))
        assert await execute(options(targets, rounds=1), tmp_path / "b", as_json=False) is Exit.INCORRECT
        assert "answered wrongly" in compared.verdict(json.loads((tmp_path / "b" / "run.json").read_text()))
    finally:
        await slow.stop()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["one:1"]}, "1 targets are named, 2 are needed"),
        ({"peer": "triton", "targets": []}, "no peer 'triton'"),
        ({"peer": "vllm", "targets": []}, "--serve"),
    ],
)
async def test_bad_usage(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """One target, an unknown peer or a peer beside nothing are refused before anything starts."""
    from dataclasses import replace

    with pytest.raises(BadInput) as refused:
        await execute(replace(options([]), **changes), tmp_path / "run", as_json=False)
    assert said in f"{refused.value.message} {refused.value.fix}"
    assert not (tmp_path / "run").exists()


class ScriptedOpenAI:
    """As much of vLLM's OpenAI server as a load test sees; `last_slot` answers for the base when not alone, as stock does."""

    def __init__(self, last_slot: str = "") -> None:
        self.last_slot = last_slot
        self.busy = 0

    async def models(self, request: web.Request) -> web.Response:
        """The base and two adapters."""
        return web.json_response({"data": [{"id": name} for name in ("base", "ada", "bob")]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """An answer that depends on who and what."""
        body = await request.json()
        self.busy += 1
        try:
            await asyncio.sleep(0.02 if body.get("stream") else 0.0)
            who = "" if body["model"] == "base" else body["model"]
            mixed = self.last_slot if not who and self.busy > 4 else who
            ids = tokens(mixed, body["prompt"], body["max_tokens"])
            if not body.get("stream"):
                logprobs = {"token_logprobs": [-0.1] * len(ids), "top_logprobs": [{"a": -0.1, "b": -4.0}] * len(ids)}
                return web.json_response({"choices": [{"token_ids": ids, "logprobs": logprobs}]})
            response = web.StreamResponse()
            await response.prepare(request)
            events: list[dict[str, Any]] = [{"choices": [{"token_ids": [token]}]} for token in ids]
            events.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": len(ids)}})
            for event in events:
                line = json.dumps({"model": body["model"], **event})
                await response.write(f"data: {line}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.busy -= 1


@pytest.fixture
async def openai(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """Its URL."""
    server = ScriptedOpenAI(getattr(request, "param", ""))
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    yield f"http://{host}:{port}"
    await runner.cleanup()


@pytest.mark.parametrize(("openai", "wrong"), [("", False), ("bob", True)], indirect=["openai"])
async def test_openai_peer(openai: str, wrong: bool) -> None:
    """An OpenAI server is given the same tape; that it answers base requests as an adapter is found, and as which."""
    async with remote(openai, 2.0, "base", workers=0) as found:
        assert found.adapters == ("ada", "bob")
        await take_references(found, found.adapters)
        load = trials.workload(duration=0.3, arrival="constant:300", base_share=0.5, timeout=2, drain=2)
        result = await run_case(found, Case(scenario="peer", name="", workload=load))
    assert result.measures["failed"] == 0
    assert result.correctness.lost_tokens == 0
    assert (result.correctness.misroutes > 0) == wrong
    if wrong:
        assert {(one.asked, one.detail.partition(";")[0]) for one in result.correctness.findings} == {
            ("base", "looks like bob")
        }
