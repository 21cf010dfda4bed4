"""Training in its own process, and what becomes of adapters, with the real base model and the real server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.client import AsyncClient
from engine.config import Settings
from engine.server.app import App
from engine.tuning.evaluation import Options, evaluate
from engine.tuning.merging import Merging
from engine.tuning.rebase import StoredSuite, on_suites
from engine.tuning.suite import read_suite
from tests.e2e.conftest import ADAPTERS, MODEL, ROOT, heldout
from tests.unit.tuning.tiny import write_base, write_recipe

pytestmark = pytest.mark.model
COMMAND = [sys.executable, "-m", "engine.cli", "train"]


def steps_of(runs: Path) -> dict[int, float]:
    """The losses of the one run in a folder, by step."""
    files = [*runs.glob("*/metrics.jsonl")]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()] if files else []
    return {event["step"]: event["loss"] for event in lines if event["event"] == "step"}


def test_a_training_process_that_is_killed_is_resumed_to_the_same_losses(tmp_path: Path) -> None:
    """SIGKILL takes the command and, with it, the process that trains; what goes on is as if nothing had happened."""
    recipe = write_recipe(
        tmp_path, write_base(tmp_path / "base"), train={"steps": 60, "evaluate_every": 10}, lora={"dropout": 0.1}
    )
    subprocess.run([*COMMAND, recipe, "--runs", tmp_path / "a"], check=True, capture_output=True)
    process = subprocess.Popen([*COMMAND, recipe, "--runs", tmp_path / "b"], stderr=subprocess.DEVNULL)
    while len(steps_of(tmp_path / "b")) < 25:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = (tmp_path / "b").iterdir()
    time.sleep(1)
    before = len(steps_of(tmp_path / "b"))
    assert before < 60
    subprocess.run([*COMMAND, "--resume", run], check=True, capture_output=True)
    assert steps_of(tmp_path / "b") == pytest.approx(steps_of(tmp_path / "a"), rel=1e-5)
    assert (run / "adapter" / "run.json").is_file()


@pytest.mark.asyncio(loop_scope="session")
async def test_shipped_adapters_score_through_the_server_what_they_scored_in_training(
    client: AsyncClient, published: list[str], tmp_path: Path
) -> None:
    """One mixed batch of a version, another one and the base; the base is far below."""
    suite = tmp_path / "suite.jsonl"
    rows = (ROOT / "examples" / "support" / "heldout.jsonl").read_text().splitlines()[:30]
    suite.write_text("\n".join(rows))
    record = await evaluate(
        client,
        read_suite(suite),
        ["support@v1", "support@v2", "base"],
        Options(max_tokens=8, loglik=True),
        lambda: None,
    )
    trained = json.loads((ADAPTERS["support@v1"] / "run.json").read_text())["evaluation"]
    results: dict[str, Any] = record["results"]
    assert results["support@v1"]["accuracy"]["value"] >= trained["interval"][0] - 0.05
    assert results["base"]["accuracy"]["value"] < 0.4
    assert results["support@v1"]["loglik"]["value"] > results["base"]["loglik"]["value"]
    asked = StoredSuite(read_suite(suite), results["support@v1"]["accuracy"]["value"], 8, ())
    (verdict,) = on_suites(MODEL, ADAPTERS["support@v1"], [asked])
    assert (verdict.new, verdict.rows, verdict.good) == (pytest.approx(verdict.old, abs=1e-4), 30, True)


@pytest.mark.asyncio(loop_scope="session")
async def test_the_merged_model_writes_what_base_and_adapter_write(
    client: AsyncClient, published: list[str], tmp_path: Path
) -> None:
    """Greedy tokens in float32: by transformers, and by the server, which serves the result as a base of its own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = ADAPTERS["legal@v1"]
    facts = Merging(adapter, "full", MODEL, None, lambda *_: None).write(
        tmp_path / "out", "base", "float32", check=True
    )
    assert facts["likeness"]["agreement"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    prompts = tokenizer([prompt for prompt, _ in heldout("legal@v1", 8)], return_tensors="pt", padding=True)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted, found = (model.generate(**prompts, max_new_tokens=8, do_sample=False) for model in (beside, merged))
    assert torch.equal(wanted, found)
    settings = Settings(model=tmp_path / "out", registry=str(tmp_path / "registry"), cache=tmp_path / "cache", port=0,
                        http_port=0, dtype="float32", context_length=256, kv_cache_gib=1, drain_s=2)  # fmt: skip
    server = App(settings)
    try:
        await server.start()
        async with AsyncClient(f"127.0.0.1:{server.port}", timeout_s=120) as alone:
            for prompt, _ in heldout("legal@v1", 4):
                one = await alone.generate(prompt=prompt, max_tokens=8, temperature=0)
                beside_base = await client.generate(prompt=prompt, adapter="legal@v1", max_tokens=8, temperature=0)
                assert one.token_ids == beside_base.token_ids
    finally:
        await server.stop()
