"""The benchmark's own server: a whole Loraplex server whose AsyncLLM can also be asked directly, in the same process.

    python -m loadtest.direct '{"model": "FOLDER", ...}'      # settings of engine.config

Front end and baseline then share one engine: two engines with equal settings differ by more than a front end costs. Reads one
JSON workload per line, runs it on AsyncLLM, and writes one JSON summary per line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import asdict

import structlog
import uvloop

from engine.config import Settings
from engine.runtime.vllm_engine import VllmEngine
from engine.server.app import App
from loadtest.measures import summarize
from loadtest.targets import InProcessTarget
from loadtest.workload import requests, run


async def main() -> None:
    """Start the server, tell its port, and answer workloads until standard input ends."""
    settings = Settings(**json.loads(sys.argv[1]))
    engine = VllmEngine(settings, settings.model)
    app = App(settings, engine)
    await app.start()
    target = InProcessTarget(engine.llm)
    _say({"port": app.port})
    while line := await asyncio.to_thread(sys.stdin.readline):
        work = json.loads(line)
        concurrency = work.pop("concurrency")
        _say(asdict(summarize(await run(target, requests(**work), concurrency))))
    await app.stop()


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        processors=[structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
