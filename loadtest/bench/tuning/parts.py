"""The four measurements. Each runs the `loraplex` command as a user does, and its baseline as a process beside it."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.vllm_plugin.precision import precision
from loadtest.bench.engines import on_cpu

EXAMPLES = Path("examples")
_ADAPTERS = ("support/v1", "support/v2", "legal/v1", "code/v1")
_LORAPLEX = [sys.executable, "-m", "engine.cli"]
_TARGETS = ["k_proj", "o_proj", "q_proj", "v_proj"]


@dataclass(frozen=True)
class Bench:
    """The base, and a folder for everything that is made."""

    model: Path
    scratch: Path

    def loraplex(self, *words: str | Path) -> dict[str, Any]:
        """Run a command of ours with --json."""
        return self._run([*_LORAPLEX, *map(str, words), "--json"])

    def module(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Run a baseline of this package."""
        return self._run([sys.executable, "-m", f"loadtest.bench.tuning.{name}", json.dumps(arguments)])

    def _run(self, command: list[str]) -> dict[str, Any]:
        with (self.scratch / "log").open("ab") as log:
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)  # noqa: S603
        if ran.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:6])} failed: {(self.scratch / 'log').read_text()[-1500:]}")
        text = ran.stdout[ran.stdout.index("{") :] if command[:3] == _LORAPLEX else ran.stdout.splitlines()[-1]
        found: dict[str, Any] = json.loads(text)
        return found

    def recipe(self, **train: Any) -> Path:
        """The support recipe for a short run, in full precision or as it says."""
        file = self.scratch / f"recipe-{random.getrandbits(32):08x}.yaml"
        content = {
            "name": "bench",
            "base": str(self.model.resolve()),
            "data": {name: str((EXAMPLES / "support" / f"{side}.jsonl").resolve())
                     for name, side in (("train", "train"), ("held_out", "heldout"))},
            "lora": {"rank": 8, "targets": "attention"},
            "train": {"learning_rate": 1e-3, "seed": 1, **train},
        }  # fmt: skip
        file.write_text(yaml.safe_dump(content))
        return file


def speed(bench: Bench, steps: int, rounds: int) -> dict[str, Any]:
    """Training tokens a second beside a plain script, in turn; padding is not counted."""
    ours, plain = [], []
    for _ in range(rounds):
        asked = {"model": str(bench.model), "rows": str(EXAMPLES / "support" / "train.jsonl")}
        found = bench.module("plain_trainer", **asked, rank=8, targets=_TARGETS, steps=steps, seed=1)
        plain.append(found["tokens_per_second"])
        run = bench.loraplex("train", bench.recipe(steps=steps, evaluate_every=steps), "--runs", bench.scratch / "runs")
        ours.append(_steps(Path(run["adapter"]).parent)[-1]["tokens_per_second"])
    ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
    return {"loraplex": statistics.median(ours), "plain": statistics.median(plain), "ratio": statistics.median(ratios),
            "ratios": ratios}  # fmt: skip


def _steps(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, each once: a resumed run tells those after its checkpoint again."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return list({event["step"]: event for event in events if event["event"] == "step"}.values())


def resume(bench: Bench, steps: int) -> dict[str, Any]:
    """A run that is killed at a random step and resumed, beside one that is not: the losses of every step."""
    unbroken = bench.loraplex("train", bench.recipe(steps=steps, evaluate_every=4), "--runs", bench.scratch / "a")
    at = random.randint(5, steps - 1)
    command = [
        *_LORAPLEX,
        "train",
        str(bench.recipe(steps=steps, evaluate_every=4)),
        "--runs",
        str(bench.scratch / "b"),
    ]
    with (bench.scratch / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603
    while not (found := [*(bench.scratch / "b").glob("*/metrics.jsonl")]) or len(_steps(found[0].parent)) < at:
        time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError("the run ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    broken = bench.loraplex("train", "--resume", found[0].parent)
    pairs = list(zip(_steps(Path(unbroken["adapter"]).parent), _steps(found[0].parent), strict=True))
    return {
        "killed_at": at,
        "unbroken": unbroken["run"]["final_loss"],
        "resumed": broken["run"]["final_loss"],
        "largest_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
    }


def merged(bench: Bench, prompts: int) -> dict[str, Any]:
    """Greedy tokens of the merged model, and of base and adapter, in float32; and what merging into 4 bits would cost."""
    adapter, suite = EXAMPLES / "support" / "v1", EXAMPLES / "support" / "heldout.jsonl"
    out = bench.scratch / "merged"
    found = bench.loraplex(
        "merge", f"{adapter}/", "--model", bench.model, "--out", out, "--dtype", "float32", "--suite", suite,
        "--demonstrate-4bit",
    )  # fmt: skip
    rows = bench.scratch / "rows.jsonl"
    held_out = [(EXAMPLES / name / "heldout.jsonl").read_text().splitlines() for name in ("support", "legal")]
    rows.write_text("\n".join([*held_out[0], *held_out[1]][:prompts]))
    same = {"rows": [str(rows)], "count": prompts, "max_tokens": 16, "dtype": "float32"}
    beside = bench.module("generate_by_hand", model=str(bench.model), adapters=[str(adapter)], **same)
    alone = bench.module("generate_by_hand", model=str(out), adapters=[""], **same)
    equal = sum(a == b for a, b in zip(beside["tokens"], alone["tokens"], strict=True))
    return {
        "prompts": len(alone["tokens"]),
        "equal": equal,
        "likeness": found["likeness"],
        "four_bits": found["four_bits"],
    }


def evaluated(bench: Bench, rows: int, port: int) -> dict[str, Any]:
    """Rows of four adapters in one mixed batch through the server, beside transformers and PEFT adapter by adapter."""
    suite = bench.scratch / "suite.jsonl"
    suite.write_text("\n".join((EXAMPLES / "support" / "train.jsonl").read_text().splitlines()[:rows]))
    folders = [str(EXAMPLES / name) for name in _ADAPTERS]
    with _server(bench, port) as target:
        names = [f"{name.replace('/', '-')}" for name in _ADAPTERS]
        for name, folder in zip(names, folders, strict=True):
            bench.loraplex("adapters", "publish", folder, name, "--server", target)
            bench.loraplex("adapters", "preload", name, "--server", target)
        ours = bench.loraplex("eval", *names, suite, "--alone", "--no-keep", "--max-tokens", "16", "--server", target)
    theirs = bench.module(
        "generate_by_hand", model=str(bench.model), adapters=folders, rows=[str(suite)] * 4, count=rows, max_tokens=16,
        dtype=precision("auto", on_cpu=on_cpu()),
    )  # fmt: skip
    return {"requests": 4 * rows, "loraplex_s": ours["seconds"], "peft_s": theirs["seconds"],
            "ratio": theirs["seconds"] / ours["seconds"]}  # fmt: skip


@contextlib.contextmanager
def _server(bench: Bench, port: int) -> Iterator[str]:
    """`loraplex serve` for the time of the block."""
    flags = ["--model", str(bench.model), "--registry", str(bench.scratch / "registry"), "--port", str(port)]
    with (bench.scratch / "log").open("ab") as log:
        command = [*_LORAPLEX, "serve", *flags, "--http-port", "0", "--log-format", "json"]
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603
    try:
        target = f"127.0.0.1:{port}"
        _wait_for(process, target)
        yield target
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)


def _wait_for(process: subprocess.Popen[bytes], target: str) -> None:
    import asyncio

    from engine.client import AsyncClient

    async def ready() -> None:
        async with AsyncClient(target) as client:
            await client.wait_ready(timeout_s=300)

    asyncio.run(ready())
    if process.poll() is not None:
        raise RuntimeError("the server did not start")
