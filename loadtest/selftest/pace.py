"""What one client process can drive: paced token messages from a scripted server in another process.

python -m loadtest.selftest.pace
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import uvloop

from loadtest.drive.case import Result, run_case
from loadtest.drive.site import Site
from loadtest.drive.targets import TargetSpec
from loadtest.plan.scenario import Case, Workload
from loadtest.selftest.server import Script, ScriptedServer

_RATE, _TOKENS, _GAP_S = 56, 100, 0.01  # 56 requests/s of 100 tokens: 5,600 messages/s on some 60 streams


def measure(seconds: float = 8.0) -> dict[str, float]:
    """Drive one worker for `seconds`; messages/s, dispatch lag in ms, and the worker's share of a core."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        result = asyncio.run(_drive(ours.recv(), seconds))
    finally:
        process.kill()
        process.join()
    window = result.measures["window_s"]
    messages = sum(
        int(((at := np.array(one.times) - result.start) >= 1).sum() - (at >= 1 + window).sum())
        for one in result.records
    )
    return {
        "messages/s": messages / window,
        "dispatch lag p50 ms": result.health.lag_p50_s * 1000,
        "dispatch lag p99 ms": result.health.lag_p99_s * 1000,
        "loop lag p99 ms": result.health.loop_lag_p99_s * 1000,
        "client CPU %": result.health.cpu * 100,
    }


async def _drive(port: int, seconds: float) -> Result:
    load: dict[str, Any] = {
        "duration": seconds, "warmup": 1, "arrival": f"constant:{_RATE}", "base_share": 1, "prompt": 8,
        "output": _TOKENS, "canary": 0,
    }  # fmt: skip
    site = Site(TargetSpec((f"127.0.0.1:{port}",), 30.0), None, workers=1)
    return await run_case(site, Case(scenario="pace", name="", workload=Workload.model_validate(load)))


def _serve(connection: Connection) -> None:
    async def forever() -> None:
        server = ScriptedServer(Script(gap_s=_GAP_S))
        await server.start()
        connection.send(server.port)
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(forever())


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name}: {value:.2f}")  # noqa: T201 - a measurement for people
