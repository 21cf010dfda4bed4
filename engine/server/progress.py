"""Long work over a stream: a message for every stage, then the result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.runtime.residency import OnStage

R = TypeVar(
    "R",
    pb.PublishAdapterResponse,
    pb.SetAliasResponse,
    pb.RollbackAliasResponse,
    pb.SetCanaryResponse,
    pb.SetShadowResponse,
    pb.PreloadAdapterResponse,
)  # each carries progress, and at last a result
_SHARES = {"receiving": 0.1, "checking": 0.5, "storing": 0.7, "loading": 0.3, "probing": 0.7, "switching": 0.9}


def progress(stage: str, detail: str) -> pb.Progress:
    """A stage, with the share of the work that is done by then."""
    return pb.Progress(stage=stage, detail=detail, fraction=_SHARES[stage])


async def reported(work: Callable[[OnStage], Awaitable[R]], response: type[R]) -> AsyncGenerator[R, None]:
    """Run `work`, yielding a `response` for each stage that it reports and at last its own. Closing this cancels the work."""
    stages: asyncio.Queue[R | None] = asyncio.Queue()

    def report(stage: str, detail: str) -> None:
        stages.put_nowait(response(progress=progress(stage, detail)))

    async def run() -> R:
        try:
            return await work(report)
        finally:
            stages.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (step := await stages.get()) is not None:
            yield step
        yield await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
