"""Starts the contenders, each a process of its own, and asks them in turn, so that the machine's drift hits all alike.

The base is asked again after every few others, and each is compared with the base just before and just after it.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.vllm_plugin.precision import precision
from loadtest.bench.adapters.plan import BETWEEN_BASES, PEFT, Entry, Stage
from loadtest.bench.adapters.weights import make_adapters
from loadtest.bench.child import Running, start_module
from loadtest.bench.engines import CONTENDER, TARGETS, EngineSpec, on_cpu, tensor_shapes

_ALONE_MOST = 2  # requests sent one at a time: more of them only take longer
Step = Callable[[str], AbstractContextManager[object]]
"""Enclosed in it is one step of the work, which the text describes."""


@dataclass(frozen=True)
class Conditions:
    """What is the same for all."""

    model: Path
    vocabulary: int
    dtype: str = "auto"
    rounds: int = 3
    max_running: int = 32
    kv_cache_gib: int = 1
    gpu_share: float = 0.1


@dataclass
class Contest:
    """What runs, and what was measured: by entry, one reply of its process for each counted round."""

    conditions: Conditions
    scratch: Path
    step: Step = nullcontext
    measured: dict[Entry, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _running: dict[str, Running] = field(default_factory=dict)

    async def run(self, stages: Sequence[Stage]) -> None:
        """Run all stages. Raises ContenderDied, naming whoever ended."""
        try:
            for stage in stages:
                await self._start(stage)
                self.measured |= {entry: [] for entry in stage.entries}
                for number in range(self.conditions.rounds + 1):
                    for entries in stage.by_workload().values():
                        await self._round(entries, number)
        finally:
            await self._stop(list(self._running))

    async def _start(self, stage: Stage) -> None:
        """Stop what the stage before needed, and start one after the other: a start takes all cores."""
        await self._stop([name for name in self._running if name not in stage.processes])
        shapes = tensor_shapes(self.conditions.model)
        folder = self.scratch / f"rank-{stage.rank}-{stage.targets}"
        folders = make_adapters(folder, shapes, TARGETS[stage.targets], stage.rank, stage.most_adapters)
        for name, entry in stage.processes.items():
            if name not in self._running:
                adapters = [str(path) for path in folders[: stage.adapters_of(name)]]
                with self.step(f"starting {name}"):
                    self._running[name], self.facts[name] = await self._contender(name, entry, adapters)

    async def _contender(self, name: str, entry: Entry, adapters: list[str]) -> tuple[Running, dict[str, Any]]:
        same = self.conditions
        if entry.contender in PEFT:
            arguments: dict[str, Any] = {
                "model": str(same.model),
                "dtype": precision(same.dtype, on_cpu=on_cpu()),
                "adapters": adapters,
            }
            module, environment = "loadtest.bench.adapters.peft_contender", {"HF_HUB_OFFLINE": "1"}
        else:
            engine = EngineSpec(
                str(same.model),
                entry.lora,
                same.dtype,
                same.max_running,
                same.kv_cache_gib,
                same.gpu_share,
                every_core=True,
            )
            arguments = {"engine": engine.to_json(), "adapters": adapters}
            module, environment = CONTENDER, engine.environment()
        return await start_module(name, module, arguments, environment, self.scratch)

    async def _round(self, entries: Sequence[Entry], number: int) -> None:
        """One workload on all of them, the base's first; round 0 is a rehearsal, and not counted."""
        base, *others = entries
        if number % 2 == 0:
            others.reverse()  # who is asked first has no lasting advantage
        bases = [await self._ask(base, number)]
        for start in range(0, len(others), BETWEEN_BASES):
            near = others[start : start + BETWEEN_BASES]
            replies = [await self._ask(entry, number) for entry in near]
            bases.append(await self._ask(base, number))
            for entry, reply in zip(near, replies, strict=True):
                self._keep(entry, number, reply, bases[-2:])
        self._keep(base, number, average(bases), [])

    async def _ask(self, entry: Entry, number: int) -> dict[str, Any]:
        workload = entry.workload if number else entry.workload.rehearsal()
        asks = workload.asks(number, self.conditions.vocabulary, entry.mix)
        if entry.contender == "peft-one":
            asks = asks[:_ALONE_MOST]
        question = {"way": entry.contender, "kind": workload.kind, "asks": [asdict(ask) for ask in asks]}
        with self.step(f"round {number} of {self.conditions.rounds}: {workload.kind}, {entry.label}"):
            return await self._running[entry.process].ask(question)

    def _keep(self, entry: Entry, number: int, reply: dict[str, Any], bases: Sequence[dict[str, Any]]) -> None:
        if number:
            base = statistics.fmean(base["tokens_per_s"] for base in bases or [reply])
            self.measured[entry].append(reply | {"base_tokens_per_s": base})

    async def _stop(self, names: Sequence[str]) -> None:
        await asyncio.gather(*(self._running.pop(name).stop() for name in names))


def average(replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One reply for several of the same process; what is no number is the first one's."""
    numbers = [name for name, value in replies[0].items() if isinstance(value, float)]
    return replies[0] | {name: statistics.fmean(reply[name] for reply in replies) for name in numbers}
