"""`make bench ARGS=affinity`: two engines behind the router, against the same two asked in turn (round-robin)."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from engine.client import AsyncClient
from loadtest.bench import output
from loadtest.bench.backends import LoraplexBackend
from loadtest.bench.callers import Request
from loadtest.bench.child import run_until_signal
from loadtest.bench.machine import machine
from loadtest.bench.residency.load import Group, watch
from loadtest.bench.residency.servers import folders, loraplex, publish
from loadtest.bench.router.process import NAME as ROUTER
from loadtest.bench.router.process import start_router

REPLICAS, SLOTS = 2, 8
ROUND_ROBIN = "round-robin"


class Counting(LoraplexBackend):
    """Asks `clients` in turn, and notes of each answer when it came and whether its adapter was resident."""

    def __init__(self, clients: Sequence[AsyncClient]) -> None:
        super().__init__(clients[0])
        self._turns = itertools.cycle(clients)
        self._hits: list[tuple[float, bool]] = []

    async def stream(self, request: Request) -> AsyncGenerator[int, None]:
        """Yield the tokens of each message."""
        self._client = next(self._turns)
        async for chunk in self.chunks(request):
            if chunk.timings:
                self._hits.append((time.perf_counter(), not chunk.timings.adapter_wait_s))
            yield len(chunk.token_ids)

    def hit_rate(self, seconds: float) -> float:
        """The share of hits among the answers of the last `seconds`. Raises RuntimeError when there was none."""
        since = time.perf_counter() - seconds
        hits = [hit for at, hit in self._hits if at >= since]
        if not hits:
            raise RuntimeError(f"no answer ended within {seconds:.0f} s: use fewer --callers or more --seconds")
        return statistics.mean(hits)


def _cores() -> list[str]:
    """The machine's cores, shared out among the replicas; all for each of them if there are fewer."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    shares = [cores[number::REPLICAS] for number in range(REPLICAS)]
    return [",".join(share) for share in (shares if all(shares) else [cores] * REPLICAS)]


async def contest(
    model: Path,
    scratch: Path,
    adapters: int,
    zipf: float,
    callers: int,
    seconds: float,
    settle_s: float,
    rounds: int,
    step: output.Step,
) -> dict[str, list[dict[str, float]]]:
    """Let both ways take turns with the same callers; by way, what each round came to."""
    async with AsyncExitStack() as stack:
        with step(f"start {REPLICAS} servers and publish {adapters} adapters"):
            made = await asyncio.to_thread(folders, scratch / "adapters", model, adapters)
            homes = [scratch / f"replica-{number}" for number in range(REPLICAS)]
            for home in homes:
                home.mkdir()
            addresses = [
                await stack.enter_async_context(
                    loraplex(
                        model, scratch, home, {"VLLM_CPU_OMP_THREADS_BIND": cores}, max_resident=SLOTS, cache=home / "cache"
                    )
                )
                for home, cores in zip(homes, _cores(), strict=True)
            ]  # fmt: skip
            await publish(addresses[0], made)
            router = await start_router(addresses, scratch)
            stack.push_async_callback(router.stop)
            *direct, routed = [
                await stack.enter_async_context(AsyncClient(address, timeout_s=600, retries=0))
                for address in (*addresses, f"127.0.0.1:{router.port}")
            ]
        ways = {ROUND_ROBIN: Counting(direct), ROUTER: Counting([routed])}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for round_, (name, backend) in itertools.product(range(rounds), ways.items()):
            with step(f"{name}, round {round_ + 1} of {rounds}"):
                group = Group(backend, callers, [folder.name for folder in made], exponent=zipf)
                (seen,) = await watch([group], seconds, settle_s, seed=round_)
                found[name].append(
                    {
                        "hit_rate": backend.hit_rate(seconds),
                        "ttft_p50_ms": seen.ttft(50),
                        "ttft_p95_ms": seen.ttft(95),
                        "tokens_per_s": seen.tokens_per_s,
                        "errors": len(seen.errors),
                    }
                )
        return found


def perfect_split(adapters: int, zipf: float) -> float:
    """How much more often an adapter is resident if the slots of all replicas hold different ones, each the most popular."""
    weights: list[float] = [rank**-zipf for rank in range(1, adapters + 1)]
    return sum(weights[: REPLICAS * SLOTS]) / sum(weights[:SLOTS])


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Of each figure, the median over the rounds of the router's as a ratio to round-robin's in the same round."""
    pairs = list(zip(found[ROUTER], found[ROUND_ROBIN], strict=True))
    names = ("hit_rate", "ttft_p50_ms", "ttft_p95_ms", "tokens_per_s")
    return {name: statistics.median(ours[name] / theirs[name] for ours, theirs in pairs) for name in names}


def table(found: dict[str, list[dict[str, float]]], ratio: dict[str, float]) -> Table:
    """The medians of both ways, and their ratios."""
    made = Table(title="Medians over the rounds", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "adapter resident", "TTFT p50", "p95", "tokens/s", "failed"):
        made.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        made.add_row(
            name, f"{middle['hit_rate']:.0%}", f"{middle['ttft_p50_ms']:.0f} ms", f"{middle['ttft_p95_ms']:.0f} ms",
            f"{middle['tokens_per_s']:.0f}", f"{sum(each['errors'] for each in rounds):.0f}",
        )  # fmt: skip
    made.add_row("ratio", *(f"{value:.2f}" for value in ratio.values()))
    return made


def affinity(
    adapters: Annotated[int, typer.Option(min=1, help="Published adapters.")] = 40,
    zipf: Annotated[float, typer.Option(min=0, help="How much more popular some are: Zipf's exponent.")] = 1.0,
    callers: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Length of each window.")] = 20,
    settle: Annotated[float, typer.Option(min=0, help="What goes before it and is not counted.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What it is worth that requests go where their adapter is: the router before two engines, against asking them in turn.

    Examples:
      make bench ARGS="affinity"           about five minutes
      make bench ARGS="affinity --zipf 0.6 --callers 32 --rounds 1"

    Two real engines of eight slots each and one registry; each has its share of
    the machine's cores. Round-robin has no router between, to its advantage.
    affinity.json goes into the report's folder.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch, output.progress(2 * rounds + 1) as step:
        work = contest(model, Path(scratch), adapters, zipf, callers, seconds, settle, rounds, step)
        found = run_until_signal(work)
    ratio = ratios(found)
    data = {
        "machine": machine(),
        "model": model.name,
        "adapters": adapters,
        "zipf": zipf,
        "callers": callers,
        "slots": SLOTS,
    }
    data["perfect_split"] = perfect_split(adapters, zipf)
    path = output.save(data | {"rounds": found, "ratios": ratio}, report / "affinity.json")
    if as_json:
        output.write_json(data | {"rounds": found, "ratios": ratio})
    else:
        output.show(
            [
                f"{adapters} adapters (Zipf {zipf:g}), {REPLICAS} replicas of {SLOTS} slots, {callers} callers",
                table(found, ratio),
                f"Slots that all held different adapters, the most popular: {data['perfect_split']:.2f} times as many hits.",
            ]
        )
    output.note(f"written: {path}")
