"""Work and changes for a long time: what grows, and what is left when all is quiet."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from engine.client import AsyncClient, FailedPrecondition
from loadtest.bench import output
from loadtest.bench.endurance.load import Load, goodput
from loadtest.bench.endurance.overload import refusals
from loadtest.bench.endurance.vitals import left_over, look, slope_mib_per_h, watched

_SHARE = 0.7  # of what it can do
_CHANGE_S = 5.0  # between changes
_IN_USE_S = 120.0  # longest that a version's last requests may take
_CALLERS = 64
# Tokens of a step. On a CPU vLLM's kernels keep about 1.6 MiB for each size that they have met (this model), for good: what
# they hold does not grow with time, but looks so until all sizes have been there.
_SIZES = range(2, 513)


async def soak(
    client: AsyncClient,
    load: Load,
    process: psutil.Process,
    adapters: Sequence[tuple[str, Path]],
    seconds: float,
    warm_s: float,
    step: output.Step,
) -> dict[str, Any]:
    """Seven tenths of what it can do for `seconds`, while versions of `adapters` come, are promoted, rolled back and go."""
    with step(f"steps of every size from {_SIZES[0]} to {_SIZES[-1]} tokens"):
        for size in _SIZES:
            await client.generate(prompt=load.tokens(size), max_tokens=1)
    with step(f"what it can do: {_CALLERS} callers for {warm_s:.0f} s"):
        peak = goodput(await load.closed(_CALLERS, warm_s), warm_s)
    await left_over(client)
    began = look(process, 0.0)
    async with watched(process) as vitals, asyncio.TaskGroup() as both:
        changes = both.create_task(_change(client, adapters))
        with step(f"{_SHARE * peak:.1f} requests/s for {seconds:.0f} s"):
            outcomes = await load.at_rate(_SHARE * peak, seconds)
        changes.cancel()
    left = await left_over(client)
    ended = look(process, 0.0)
    slope = slope_mib_per_h(vitals)
    thousands_per_h = len(outcomes) / seconds * 3.6
    return {
        "peak_per_s": peak,
        "requests": len(outcomes),
        **refusals(outcomes),
        "memory_mib": (began.memory_mib, ended.memory_mib),
        "memory_mib_per_h": slope,
        "memory_mib_per_1000_requests": slope / thousands_per_h if thousands_per_h else 0.0,
        "files": (began.files, ended.files),
        "left": left,
    }


async def _change(client: AsyncClient, adapters: Sequence[tuple[str, Path]]) -> None:
    """Publish, promote, roll back, unload: aliases and slots are as before after each turn."""
    for name, folder in itertools.cycle(adapters):
        version = (await client.adapters.publish(folder, name, notes="soak")).version
        await asyncio.sleep(_CHANGE_S)
        await client.adapters.promote(name, version)
        await asyncio.sleep(_CHANGE_S)
        await client.adapters.rollback(name)
        await _unload(client, f"{name}@{version}")


async def _unload(client: AsyncClient, ref: str) -> None:
    """When the requests that have begun with it have ended."""
    async with asyncio.timeout(_IN_USE_S):
        while True:
            try:
                await client.adapters.unload(ref)
                return
            except FailedPrecondition:
                await asyncio.sleep(1)
