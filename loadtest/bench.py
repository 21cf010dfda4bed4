"""What the front end costs: our gRPC server against AsyncLLM in process and against vLLM's own OpenAI server.

    make bench                        about six minutes on two cores
    make bench ARGS="--rounds 5"

AsyncLLM and our server are one process with one engine, asked with and without the front end; vLLM's server has an engine of
its own with the same settings. They take turns, so that the machine's drift hits all alike; one round of each to warm up is not
counted. Every request streams, greedily and with exactly as many tokens as it asks for. `loraplex serve` is started and stopped
before all that, for its start time alone.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.client import AsyncClient
from loadtest.measures import summarize
from loadtest.processes import EngineSettings, Running, ask_direct, start_loraplex, start_shared, start_vllm_serve
from loadtest.targets import LoraplexTarget, OpenAITarget
from loadtest.workload import requests, run

DIRECT, OURS, VLLM = "AsyncLLM in process", "loraplex GenerateStream", "vllm serve (OpenAI)"
ALONE = 15  # requests sent one at a time in each round
console = Console(width=None if sys.stdout.isatty() else 140)


class Contest:
    """The three contestants, started once, asked in turn."""

    def __init__(self, settings: EngineSettings, target_modules: list[str], concurrency: int) -> None:
        self._settings = settings
        self._modules = target_modules
        self._concurrency = concurrency
        self.started: dict[str, Running] = {}
        self.start_s: dict[str, float] = {}

    async def start(self, scratch: Path) -> None:
        """Start one after the other: a start takes all cores, and its time is a figure of its own."""
        ours = await start_loraplex(self._settings, scratch)
        await ours.stop()
        self.start_s[OURS] = ours.ready_s
        self.started[VLLM] = await start_vllm_serve(self._settings, self._modules, scratch)
        self.start_s[VLLM] = self.started[VLLM].ready_s
        self.started[DIRECT] = self.started[OURS] = await start_shared(self._settings, scratch)

    async def stop(self) -> None:
        """Stop whatever runs."""
        await asyncio.gather(*(self.started[name].stop() for name in (VLLM, DIRECT) if name in self.started))

    async def round(self, name: str, work: dict[str, Any]) -> dict[str, Any]:
        """Run one workload on one of them, then a few requests one at a time: their TTFT has no queue in it."""
        busy = await self._run(name, work, self._concurrency)
        alone = await self._run(name, work | {"count": ALONE, "max_tokens": 4, "seed": work["seed"] + 1000}, 1)
        return busy | {"alone_ttft_p50_ms": alone["ttft_p50_ms"]}

    async def _run(self, name: str, work: dict[str, Any], concurrency: int) -> dict[str, Any]:
        if name == DIRECT:
            return await ask_direct(self.started[DIRECT], work | {"concurrency": concurrency})
        port = self.started[name].port
        if name == OURS:
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                return asdict(summarize(await run(LoraplexTarget(client), requests(**work), concurrency)))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            target = OpenAITarget(session, f"http://127.0.0.1:{port}", "base")
            return asdict(summarize(await run(target, requests(**work), concurrency)))


async def contest(settings: EngineSettings, concurrency: int, rounds: int, work: dict[str, Any]) -> dict[str, Any]:
    """Run everything; returns, by contestant, the start time and the median of every measure over the rounds."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    race = Contest(settings, modules, concurrency)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder, Progress(console=Console(stderr=True)) as bar:
        steps = bar.add_task("starting three engines", total=3 * (rounds + 1))
        try:
            await race.start(Path(folder))
            measured: dict[str, list[dict[str, Any]]] = {name: [] for name in (DIRECT, OURS, VLLM)}
            for number in range(rounds + 1):
                order = list(measured) if number % 2 else list(reversed(measured))
                for name in order:
                    bar.update(steps, description=f"round {number} of {rounds}: {name}")
                    own = list(measured).index(name)  # prompts of its own: two of them share a prefix cache
                    measured[name].append(await race.round(name, work | {"seed": 10 * number + own}))
                    bar.advance(steps)
        finally:
            await race.stop()
    return {
        name: {"start_s": race.start_s.get(name), "rounds": results[1:]} | _medians(results[1:])
        for name, results in measured.items()
    }


def _medians(results: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def show(results: dict[str, Any]) -> None:
    """Print the table, with ratios against AsyncLLM in process."""
    table = Table(title="Medians over the rounds")
    headings = (
        "",
        "tokens/s",
        "of direct",
        "TTFT p50",
        "above",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
        "1 stream TTFT",
        "above",
        "start",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    direct = results[DIRECT]
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['tokens_per_s']:.1f}",
            f"{result['tokens_per_s'] / direct['tokens_per_s']:.3f}",
            f"{result['ttft_p50_ms']:.1f} ms",
            f"{result['ttft_p50_ms'] - direct['ttft_p50_ms']:+.1f} ms",
            f"{result['ttft_p99_ms']:.0f} ms",
            f"{result['itl_p50_ms']:.1f} ms",
            f"{result['itl_p99_ms']:.1f} ms",
            f"{result['alone_ttft_p50_ms']:.1f} ms",
            f"{result['alone_ttft_p50_ms'] - direct['alone_ttft_p50_ms']:+.1f} ms",
            "" if result["start_s"] is None else f"{result['start_s']:.1f} s",
        )
    console.print(table)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")] = Path(".models/smollm2-135m-instruct"),
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 16,
    count: Annotated[int, typer.Option("--requests", min=1, help="Requests of a round.")] = 48,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 48,
    words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare throughput, TTFT, ITL and start time of the three, on base-model requests."""
    settings = EngineSettings(model.resolve(), 32, 8, 16, 2, 512)
    work = {"count": count, "prompt_words": words, "max_tokens": tokens}
    results = asyncio.run(contest(settings, streams, rounds, work))
    if as_json:
        console.print_json(json.dumps(results))
    else:
        console.print(
            f"{streams} streams, {count} requests a round, {words} words in, {tokens} tokens out, {rounds} rounds"
        )
        show(results)


if __name__ == "__main__":
    typer.run(main)
