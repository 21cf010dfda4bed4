"""`make bench ARGS=residency`: the cliff, and what adapters outside of the slots do to those inside."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from engine.client import AsyncClient
from loadtest.bench import output
from loadtest.bench.backends import LoraplexBackend
from loadtest.bench.child import run_until_signal, start_module
from loadtest.bench.engines import ATTENTION, EngineSpec, Lora
from loadtest.bench.machine import machine
from loadtest.bench.residency.chart import draw
from loadtest.bench.residency.load import Group, Window, watch
from loadtest.bench.residency.servers import RANK, folders, loraplex, name_of, publish

SLOTS, CALLERS = 8, 64
CURVE = (4, 8, 10, 16, 32, 128, 1000)
PARTS = ("cliff", "stock", "starvation", "stall", "fairness")


@dataclass
class Run:
    """One run of the command: where things lie, how long each window is, and what came out."""

    model: Path
    root: Path
    scratch: Path
    seconds: float
    settle_s: float
    rounds: int
    curve: Sequence[int]
    callers: int
    step: output.Step
    found: dict[str, Any] = field(default_factory=dict)
    _seeds: itertools.count[int] = field(default_factory=itertools.count)

    def names(self, count: int) -> list[str]:
        """The most popular adapters."""
        return [name_of(number) for number in range(1, count + 1)]

    async def watch(self, *groups: Group, settle: float = 1.0) -> list[Window]:
        """One window of these callers, after `settle` times the usual time."""
        return await watch(groups, self.seconds, settle * self.settle_s, seed=next(self._seeds))

    async def cliff(self) -> None:
        """Throughput with ever more adapters, each point between two of the load whose adapters all fit."""
        with self.step(f"start a server and publish {max(self.curve)} adapters"):
            made = await asyncio.to_thread(folders, self.root / "adapters", self.model, max(self.curve))
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(loraplex(self.model, self.root, self.scratch, max_resident=SLOTS))
            await publish(address, made)
            client = await stack.enter_async_context(AsyncClient(address, timeout_s=600, retries=0))
            points: dict[int, list[dict[str, float]]] = {count: [] for count in self.curve if count != SLOTS}
            for round_, (count, found) in itertools.product(range(self.rounds), points.items()):
                with self.step(f"{count} adapters in {SLOTS} slots, round {round_ + 1}"):
                    before, seen, after = [await self._point(client, n) for n in (SLOTS, count, SLOTS)]
                    found.append(_ratios(seen, before, after))
        self.found["cliff"] = points

    async def _point(self, client: AsyncClient, count: int) -> Window:
        group = Group(LoraplexBackend(client), self.callers, self.names(count), exponent=1.0)
        (seen,) = await self.watch(group)
        return seen

    async def stock(self) -> None:
        """The same with vLLM alone, which loads and evicts as it likes."""
        made = await asyncio.to_thread(folders, self.root / "adapters", self.model, max(self.curve))
        spec = EngineSpec(str(self.model.resolve()), Lora(SLOTS - 1, RANK, ATTENTION, kernels="off"))
        arguments = {"engine": spec.to_json(), "adapters": [str(folder.resolve()) for folder in made]}
        with self.step("start vLLM"):
            module = "loadtest.bench.residency.stock"
            running, _ = await start_module("vLLM", module, arguments, spec.environment(), self.scratch)
        try:
            points = {}
            for count in (SLOTS, *(count for count in self.curve if count != SLOTS)):
                with self.step(f"vLLM alone, {count} adapters in {SLOTS} slots"):
                    question = {"adapters": count, "callers": self.callers, "exponent": 1.0}
                    points[count] = await running.ask(question | {"settle_s": self.settle_s, "seconds": self.seconds})
        finally:
            await running.stop()
        fits = points[SLOTS]["tokens_per_s"]
        self.found["stock"] = {n: point | {"ratio": point["tokens_per_s"] / fits} for n, point in points.items()}

    async def starvation(self) -> None:
        """Two slots, two busy adapters, sixteen callers, and one caller for a third: the case in which vLLM never answers."""
        made = await asyncio.to_thread(folders, self.root / "adapters", self.model, 3)
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(loraplex(self.model, self.root, self.scratch, max_resident=2))
            await publish(address, made)
            backend = LoraplexBackend(await stack.enter_async_context(AsyncClient(address, timeout_s=600, retries=0)))
            busy = Group(backend, 16, self.names(2), answers=(8, 48))
            third = Group(backend, 1, self.names(3)[2:], answers=(8, 48))
            rounds = []
            for round_ in range(self.rounds):
                with self.step(f"a third adapter for two slots, round {round_ + 1}"):
                    (alone,) = await self.watch(busy)
                    beside, other = await self.watch(busy, third)
                    rounds.append(
                        {
                            "third_ttft_max_ms": max(other.ttfts, default=float("inf")),
                            "third_answers": len(other.ttfts),
                            "busy_ttft_p99_ms": beside.ttft(99),
                            "busy_ttft_p99_alone_ms": alone.ttft(99),
                            "times_busy_p99": max(other.ttfts, default=float("inf")) / beside.ttft(99),
                            "busy_throughput": beside.tokens_per_s / alone.tokens_per_s,
                            "all_throughput": (beside.tokens + other.tokens) / beside.seconds / alone.tokens_per_s,
                        }
                    )
        self.found["starvation"] = rounds

    async def stall(self) -> None:
        """Gaps between tokens while adapters are loaded one after the other, and without."""
        made = await asyncio.to_thread(folders, self.root / "adapters", self.model, 64)
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(loraplex(self.model, self.root, self.scratch, max_resident=SLOTS))
            await publish(address, made)
            client = await stack.enter_async_context(AsyncClient(address, timeout_s=600, retries=0))
            running = Group(LoraplexBackend(client), 8, self.names(4), answers=(64, 64))
            rounds = []
            for round_ in range(self.rounds):
                with self.step(f"loads beside running requests, round {round_ + 1}"):
                    (quiet,) = await self.watch(running)
                    (first, loads), (again, reloads) = [
                        await self._loading(client, running, self.names(64)[4:]) for _ in range(2)
                    ]
                    rounds.append(
                        {
                            "gap_p99_ms": quiet.gap(99),
                            "first_loads": _ratio_of_gaps(first, quiet) | {"loads_per_s": loads},
                            "reloads": _ratio_of_gaps(again, quiet) | {"loads_per_s": reloads},
                        }
                    )
        self.found["stall"] = rounds

    async def _loading(self, client: AsyncClient, running: Group, names: Sequence[str]) -> tuple[Window, float]:
        """A window in which these adapters are loaded one after the other, again and again; and the loads in a second."""
        loads = 0

        async def load() -> None:
            nonlocal loads
            for name in itertools.cycle(names):
                await client.adapters.preload(name)
                loads += 1

        task = asyncio.create_task(load())
        try:
            (seen,) = await self.watch(running)
            return seen, loads / (self.seconds + self.settle_s)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def fairness(self) -> None:
        """Five tenants on an engine that is full; then one of them sends ten times as much."""
        made = await asyncio.to_thread(folders, self.root / "adapters", self.model, 5)
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(loraplex(self.model, self.root, self.scratch, max_resident=SLOTS))
            await publish(address, made)
            backends = []
            for number in range(5):
                tenant = (("x-loraplex-tenant", f"tenant-{number}"),)
                client = AsyncClient(address, timeout_s=600, retries=0, metadata=tenant)
                backends.append(LoraplexBackend(await stack.enter_async_context(client)))
            share = 7  # callers: five times as many fill the 32 places
            rounds = []
            for round_ in range(self.rounds):
                with self.step(f"a tenant that sends ten times its share, round {round_ + 1}"):
                    before, after = [
                        # All callers begin at once: what counts is what becomes of it when that is over.
                        (await self.watch(*_tenants(backends, self.names(5), share, times), settle=4))[1:]
                        for times in (1, 10)
                    ]
                    p95 = [statistics.mean(seen.ttft(95) for seen in windows) for windows in (before, after)]
                    rounds.append(
                        {"others_ttft_p95_ms": p95[0], "beside_ten_times_ms": p95[1], "ratio": p95[1] / p95[0]}
                    )
        self.found["fairness"] = rounds


def _tenants(backends: Sequence[LoraplexBackend], names: Sequence[str], share: int, times: int) -> list[Group]:
    return [
        Group(backend, share * (times if number == 0 else 1), [name])
        for number, (backend, name) in enumerate(zip(backends, names, strict=True))
    ]


def _ratios(seen: Window, *fitting: Window) -> dict[str, float]:
    fits = statistics.mean(window.tokens_per_s for window in fitting)
    return {
        "tokens_per_s": seen.tokens_per_s,
        "fitting_tokens_per_s": fits,
        "ratio": seen.tokens_per_s / fits,
        "ttft_p50_ms": seen.ttft(50),
        "ttft_p99_ms": seen.ttft(99),
        "errors": len(seen.errors),
    }


def _ratio_of_gaps(seen: Window, quiet: Window) -> dict[str, float]:
    return {"gap_p99_ms": seen.gap(99), "ratio": seen.gap(99) / quiet.gap(99)}


def residency(
    parts: Annotated[str, typer.Option(metavar="LIST", help=f"Which parts: {', '.join(PARTS)}.")] = ",".join(PARTS),
    seconds: Annotated[float, typer.Option(min=1, help="Length of each window.")] = 15,
    settle: Annotated[float, typer.Option(min=0, help="What goes before it and is not counted.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 1,
    adapters: Annotated[str, typer.Option(metavar="LIST", help="Points of the curve, for eight slots.")] = ",".join(
        map(str, CURVE)
    ),
    callers: Annotated[int, typer.Option(min=1, help="Requests at once, on the cliff.")] = CALLERS,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep adapters and registry there, for the next run.")
    ] = None,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What more adapters than slots cost: throughput, waits, gaps between tokens, and one tenant's flood.

    Examples:
      make bench ARGS="residency"          about twelve minutes
      make bench ARGS="residency --parts cliff --adapters 8,1000"
      make bench ARGS="residency --parts stall,fairness --rounds 3"

    cliff: a thousand published adapters, as popular as Zipf's law has it, in
    eight slots; 64 callers; each point as a ratio to eight adapters, measured
    just before and after. stock is the same on vLLM alone, with its kernels.
    residency.json and the chart go into the report's folder.
    """
    wanted = output.chosen("--parts", parts, str, PARTS)
    curve = output.chosen("--adapters", adapters, output.positive)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch, output.progress(40) as step:
        root = keep or Path(scratch) / "world"
        root.mkdir(parents=True, exist_ok=True)
        run = Run(model, root, Path(scratch), seconds, settle, rounds, curve, callers, step)

        async def work() -> None:
            for part in wanted:
                await getattr(run, part)()

        run_until_signal(work())
    found = {"machine": machine(), "model": model.name, "callers": callers, "slots": SLOTS} | run.found
    path = output.save(found, report / "residency.json")
    if {"cliff", "stock"} & run.found.keys():
        output.note(f"written: {_chart(run.found, found, report / 'cliff')}")
    if as_json:
        output.write_json(found)
    else:
        output.show(tables(run.found))
    output.note(f"written: {path}")


def _chart(found: dict[str, Any], about: dict[str, Any], path: Path) -> Path:
    cliff = found.get("cliff", {})
    ours = {n: statistics.median(each["tokens_per_s"] for each in rounds) for n, rounds in cliff.items()}
    if cliff:
        ours[SLOTS] = statistics.median(each["fitting_tokens_per_s"] for rounds in cliff.values() for each in rounds)
    stock = {n: point["tokens_per_s"] for n, point in found.get("stock", {}).items()}
    lines = {name: points for name, points in (("Loraplex", ours), ("vLLM alone", stock)) if points}
    per_slot = {name: {n / SLOTS: y for n, y in points.items()} for name, points in lines.items()}
    footnote = f"{about['callers']} callers, Zipf 1.0, {SLOTS} slots, {about['model']}, {about['machine']['cpu']}"
    return draw(per_slot, footnote, path)[0]


def tables(found: dict[str, Any]) -> list[Table]:
    """One table for each part."""
    made = [_flat(part, found[part]) for part in ("starvation", "stall", "fairness") if part in found]
    if "cliff" in found or "stock" in found:
        made.insert(0, _curve(found.get("cliff", {}), found.get("stock", {})))
    return made


def _curve(ours: dict[int, list[dict[str, float]]], stock: dict[int, dict[str, float]]) -> Table:
    made = Table(title="Throughput, of the load whose adapters fit", title_justify="left", box=None, pad_edge=False)
    for heading in (
        "adapters",
        "Loraplex",
        "tokens/s",
        "TTFT p50",
        "p99",
        "failed",
        "vLLM alone",
        "tokens/s",
        "TTFT p50",
    ):
        made.add_column(heading, justify="right")
    for count in sorted({*ours, *stock}):
        row = [str(count)]
        if rounds := ours.get(count):
            ratios = [each["ratio"] for each in rounds]
            span = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
            middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
            row += [f"{middle['ratio']:.2f}{span}", f"{middle['tokens_per_s']:.0f}"]
            row += [
                f"{middle['ttft_p50_ms'] / 1000:.2f} s",
                f"{middle['ttft_p99_ms'] / 1000:.2f} s",
                f"{middle['errors']:.0f}",
            ]
        else:
            row += ["1" if count == SLOTS else "", "", "", "", ""]
        if point := stock.get(count):
            row += [f"{point['ratio']:.2f}", f"{point['tokens_per_s']:.0f}", f"{point['ttft_p50_ms'] / 1000:.2f} s"]
        made.add_row(*row)
    return made


def _flat(title: str, rounds: list[dict[str, Any]]) -> Table:
    """A part's figures, one column for each round."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    made.add_column("")
    for number in range(len(rounds)):
        made.add_column(f"round {number + 1}", justify="right")
    rows = [dict(_leaves(each)) for each in rounds]
    for name in rows[0]:
        made.add_row(name.replace("_", " "), *(f"{row[name]:.2f}" for row in rows))
    return made


def _leaves(data: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    leaves: list[tuple[str, float]] = []
    for name, value in data.items():
        leaves += _leaves(value, f"{prefix}{name}: ") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves
