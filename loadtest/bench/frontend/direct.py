"""The comparison's own server: a whole Loraplex server whose AsyncLLM can also be asked directly, in the same process.

    python -m loadtest.bench.frontend.direct '{"model": "FOLDER", ...}'      # settings of engine.config

Front end and baseline then share one engine: two engines with equal settings differ by more than a front end costs. Reads one
JSON workload per line, runs it on AsyncLLM, and writes one JSON summary per line.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import asdict
from typing import Any

import structlog
import uvloop

from engine.config import Settings
from engine.runtime.vllm.engine import VllmEngine
from engine.server.app import App
from loadtest.bench.backends import InProcessBackend
from loadtest.bench.callers import requests, run
from loadtest.bench.child import Handler, Stop, serve
from loadtest.bench.samples import summarize


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Start the server; returns its port, who answers workloads, and how it is stopped."""
    settings = Settings(**arguments)
    engine = VllmEngine(settings, settings.model)
    app = App(settings, engine)
    await app.start()
    backend = InProcessBackend(engine.llm)

    async def answer(work: dict[str, Any]) -> dict[str, Any]:
        concurrency = work.pop("concurrency")
        return asdict(summarize(await run(backend, requests(**work), concurrency)))

    return {"port": app.port}, answer, app.stop


if __name__ == "__main__":
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        processors=[structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(prepare))
