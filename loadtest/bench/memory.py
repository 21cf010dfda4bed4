"""What adapter slots cost: memory and start-up time of an engine as slots and rank grow, above an engine without any.

Memory is the proportional set size (PSS) of the engine's processes: shared pages count once. vLLM's slots are pages that
nobody has touched until an adapter is loaded, and of each loaded adapter it keeps a copy beside the slot: so it is measured
both after the start, and with an adapter in every slot that has answered a request. The first few adapters look cheap: they
go into memory that the start has used and freed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from engine.config import VLLM_RANKS
from loadtest.bench import output
from loadtest.bench.adapters.weights import WEIGHTS, make_adapter
from loadtest.bench.adapters.workloads import Mix, Workload
from loadtest.bench.child import Running, run_until_signal, start_module
from loadtest.bench.engines import CONTENDER, TARGETS, EngineSpec, Lora, tensor_shapes
from loadtest.bench.machine import machine

_MIB = 1024**2
USUAL = ((1, 16), (8, 16), (32, 16), (8, 64))
_SLOTS, _RANKS = (1, 8, 16, 32, 64), (8, 16, 64)


@dataclass(frozen=True)
class Cost:
    """One engine: adapters that it has room for (0: no LoRA), seconds until ready, MiB then and with all slots full.

    `adapter_mib` is the size of one adapter's weights, in two bytes each.
    """

    slots: int
    rank: int
    start_s: float
    started_mib: float
    full_mib: float
    kv_cache_tokens: int
    adapter_mib: float = 0.0

    def above(self, base: Cost) -> dict[str, float]:
        """What it costs more than the engine without adapters, in all and for each adapter."""
        full = self.full_mib - base.full_mib
        return {
            "start_s": self.start_s - base.start_s,
            "started_mib": self.started_mib - base.started_mib,
            "full_mib": full,
            "per_adapter_mib": full / self.slots if self.slots else 0.0,
        }


def pss_mib(pid: int) -> float:
    """Proportional set size of a process and all below it, in MiB."""
    leader = psutil.Process(pid)
    return float(sum(process.memory_full_info().pss for process in (leader, *leader.children(recursive=True)))) / _MIB


async def measure(grid: Sequence[tuple[int, int]], spec: EngineSpec, targets: str, step: output.Step) -> list[Cost]:
    """Start one engine after the other, the one without adapters first; `grid` has slots and rank."""
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        costs = []
        for slots, rank in ((0, 0), *grid):
            with step(f"{slots} slots, rank {rank}" if slots else "base"):
                costs.append(await _one(slots, rank, spec, targets, Path(folder)))
    return costs


async def _one(slots: int, rank: int, same: EngineSpec, targets: str, scratch: Path) -> Cost:
    layers = TARGETS[targets]
    lora = Lora(slots, rank, layers) if slots else None
    spec = replace(same, lora=lora, max_running=max(same.max_running, slots))
    adapters: list[str] = []
    size = 0.0
    if slots:
        made = make_adapter(scratch / f"rank-{rank}", tensor_shapes(Path(same.model)), layers, rank, seed=1)
        adapters = [str(made)] * slots  # a copy in memory for each id, whatever they hold
        size = (made / WEIGHTS).stat().st_size / _MIB
    name = f"{slots} slots, rank {rank}" if slots else "base"
    arguments = {"engine": spec.to_json(), "adapters": adapters}
    running, facts = await start_module(name, CONTENDER, arguments, spec.environment(), scratch)
    try:
        started = pss_mib(running.pid)
        await _fill(running, slots)
        return Cost(slots, rank, running.ready_s, started, pss_mib(running.pid), facts["kv_cache_tokens"], size)
    finally:
        await running.stop()


async def _fill(running: Running, slots: int) -> None:
    """One request for each adapter, or one for the base."""
    workload = Workload("prefill", max(1, slots), long=8)
    asks = workload.asks(seed=1, vocabulary=1000, mix=Mix(slots))
    await running.ask({"kind": workload.kind, "asks": [asdict(ask) for ask in asks]})


def table(costs: Sequence[Cost]) -> Table:
    """The costs, each above the engine without adapters."""
    base, *others = costs
    made = Table(title="Adapter slots: memory and start-up", title_justify="left", box=None, pad_edge=False)
    for heading in (
        "slots", "rank", "start", "above base", "memory", "above base", "slots full", "above base", "each", "weights",
    ):  # fmt: skip
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_row(
        "none",
        "",
        f"{base.start_s:.1f} s",
        "",
        f"{base.started_mib:.0f} MiB",
        "",
        f"{base.full_mib:.0f} MiB",
        "",
        "",
        "",
    )
    for cost in others:
        above = cost.above(base)
        made.add_row(
            str(cost.slots), str(cost.rank), f"{cost.start_s:.1f} s", f"{above['start_s']:+.1f} s",
            f"{cost.started_mib:.0f} MiB", f"{above['started_mib']:+.0f} MiB",
            f"{cost.full_mib:.0f} MiB", f"{above['full_mib']:+.0f} MiB", f"{above['per_adapter_mib']:.1f} MiB",
            f"{cost.adapter_mib:.1f} MiB",
        )  # fmt: skip
    return made


def to_json(costs: Sequence[Cost], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, for programs."""
    base = costs[0]
    return {**about, "costs": [{**asdict(cost), "above_base": cost.above(base)} for cost in costs]}


def memory(
    full: Annotated[
        bool, typer.Option("--full", help="1 to 64 slots at ranks 8, 16 and 64: 16 starts, 8 minutes.")
    ] = False,
    slots: Annotated[str | None, typer.Option(metavar="LIST", help="Adapters at once, such as 8,32.")] = None,
    ranks: Annotated[str | None, typer.Option(metavar="LIST", help="Largest ranks, such as 16,64.")] = None,
    targets: Annotated[str, typer.Option(help=f"Layers with slots: {' or '.join(TARGETS)}.")] = "all-linear",
    dtype: Annotated[str, typer.Option(help="Precision to compute in, as vLLM says it; auto: as serve.")] = "auto",
    kv_cache_gib: Annotated[int, typer.Option(min=1, help="Memory for the key-value cache on a CPU.")] = 1,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What adapter slots cost in memory and start-up time, above an engine without any.

    Examples:
      make bench ARGS="memory"             five starts: 2.5 minutes
      make bench ARGS="memory --full"
      make bench ARGS="memory --slots 8,64 --ranks 16"

    Memory is that of all the engine's processes (PSS), after the start and
    again with an adapter in every slot. As in the server all linear layers
    have slots. On a GPU read kv_cache_tokens in the JSON: there slots take
    from the cache. memory.json goes into the report's folder.
    """
    grid = _grid(full, slots, ranks)
    (layers,) = output.chosen("--targets", targets, str, tuple(TARGETS))
    spec = EngineSpec(str(model.resolve()), dtype=dtype, kv_cache_gib=kv_cache_gib, gpu_share=0.85)
    with output.progress(1 + len(grid)) as step:
        costs = run_until_signal(measure(grid, spec, layers, step))
    about = {"machine": machine(), "model": model.name, "targets": targets, "kv_cache_gib": kv_cache_gib}
    path = output.save(to_json(costs, about), report / "memory.json")
    if as_json:
        output.write_json(to_json(costs, about))
    else:
        output.show([table(costs)])
    output.note(f"written: {path}")


def _grid(full: bool, slots: str | None, ranks: str | None) -> Sequence[tuple[int, int]]:
    """The slots and ranks to start engines with."""
    if not (full or slots or ranks):
        return USUAL
    counts = output.chosen("--slots", slots, output.positive) if slots else _SLOTS if full else (8,)
    largest = output.chosen("--ranks", ranks, output.positive, VLLM_RANKS) if ranks else _RANKS if full else (16,)
    return list(product(counts, largest))
