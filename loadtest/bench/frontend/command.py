"""What the front end costs: our gRPC server against AsyncLLM in process and against vLLM's own OpenAI server.

AsyncLLM and our server are one process with one engine, asked with and without the front end; vLLM's server has an engine of
its own with the same settings. They take turns, so that the machine's drift hits all alike; one round of each to warm up is not
counted. Every request streams, greedily and with exactly as many tokens as it asks for. Both servers are started and stopped
twice before all that, for their start time alone.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.table import Table

from engine.client import AsyncClient
from loadtest.bench import output
from loadtest.bench.backends import LoraplexBackend, OpenAIBackend
from loadtest.bench.callers import requests, run
from loadtest.bench.child import Running, run_until_signal
from loadtest.bench.engines import ALL_LINEAR, EngineSpec, Lora
from loadtest.bench.frontend.servers import start_loraplex, start_shared, start_vllm_serve
from loadtest.bench.machine import machine
from loadtest.bench.samples import summarize

DIRECT, OURS, VLLM = "AsyncLLM in process", "loraplex GenerateStream", "vllm serve (OpenAI)"
ALONE = 15  # requests sent one at a time in each round


class Contest:
    """The three contestants, started once, asked in turn."""

    def __init__(self, spec: EngineSpec, concurrency: int) -> None:
        self._spec = spec
        self._concurrency = concurrency
        self.started: dict[str, Running] = {}
        self.start_s: dict[str, float] = {}

    async def start(self, scratch: Path) -> None:
        """Start one after the other: a start takes all cores, and its time is a figure of its own.

        The servers start twice, as the very first start reads all libraries from disk; the quicker start counts.
        """
        for start, name in ((start_loraplex, OURS), (start_vllm_serve, VLLM)) * 2:
            server = await start(self._spec, scratch)
            await server.stop()
            self.start_s[name] = min(server.ready_s, self.start_s.get(name, server.ready_s))
        self.started[VLLM] = await start_vllm_serve(self._spec, scratch)
        self.started[DIRECT] = self.started[OURS] = await start_shared(self._spec, scratch)

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
            return await self.started[DIRECT].ask(work | {"concurrency": concurrency})
        port = self.started[name].port
        if name == OURS:
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                return asdict(summarize(await run(LoraplexBackend(client), requests(**work), concurrency)))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            backend = OpenAIBackend(session, f"http://127.0.0.1:{port}", "base")
            return asdict(summarize(await run(backend, requests(**work), concurrency)))


async def contest(spec: EngineSpec, concurrency: int, rounds: int, work: dict[str, Any]) -> dict[str, Any]:
    """Run everything; returns, by contestant, the start time and the median of every measure over the rounds."""
    race = Contest(spec, concurrency)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in (DIRECT, OURS, VLLM)}
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder,
        output.progress(1 + len(measured) * (rounds + 1)) as step,
    ):
        try:
            with step("starting three engines"):
                await race.start(Path(folder))
            for number in range(rounds + 1):
                for name in list(measured) if number % 2 else list(reversed(measured)):
                    own = list(measured).index(name)  # prompts of its own: two of them share a prefix cache
                    with step(f"round {number} of {rounds}: {name}"):
                        measured[name].append(await race.round(name, work | {"seed": 10 * number + own}))
        finally:
            await race.stop()
    return {
        name: {"start_s": race.start_s.get(name), "rounds": results[1:]} | _medians(results[1:])
        for name, results in measured.items()
    }


def _medians(results: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def table(results: dict[str, Any]) -> Table:
    """The medians, with ratios against AsyncLLM in process."""
    made = Table(title="Medians over the rounds", title_justify="left", title_style="bold", box=None, pad_edge=False)
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
        made.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    direct = results[DIRECT]
    for name, result in results.items():
        made.add_row(
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
    return made


def frontend(
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 16,
    count: Annotated[int, typer.Option("--requests", min=1, help="Requests of a round.")] = 96,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, on average.")] = 48,
    words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 16,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What the gRPC front end costs: against AsyncLLM in process, and against vLLM's own OpenAI server.

    Examples:
      make bench ARGS="frontend"           seven minutes on two cores
      make bench ARGS="frontend --rounds 3 --streams 32"

    Throughput, TTFT, ITL and start time of the three, on base-model requests.
    frontend.json goes into the report's folder.
    """
    spec = EngineSpec(str(model.resolve()), Lora(8, 16, ALL_LINEAR), kv_cache_gib=2, gpu_share=0.4, prefix_cache=True)
    work = {"count": count, "prompt_words": words, "max_tokens": tokens}
    results = run_until_signal(contest(spec, streams, rounds, work))
    data = {"machine": machine(), "streams": streams, **work, "results": results}
    path = output.save(data, report / "frontend.json")
    if as_json:
        output.write_json(data)
    else:
        title = f"{streams} streams, {count} requests a round, {words} words in, {tokens} tokens out, {rounds} rounds"
        output.show([title, table(results)])
    output.note(f"written: {path}")
