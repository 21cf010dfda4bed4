"""AsyncLLM in a process of its own, for the benchmark: reads one JSON workload per line, writes one JSON summary per line.

python -m loadtest.direct '{"model": "FOLDER", ...}'      # the arguments of vLLM's AsyncEngineArgs
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from loadtest.measures import summarize
from loadtest.targets import InProcessTarget
from loadtest.workload import requests, run


async def main() -> None:
    """Start the engine, say so, and answer workloads until standard input ends."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**json.loads(sys.argv[1])))
    target = InProcessTarget(llm)
    _say({"ready": True})
    while line := await asyncio.to_thread(sys.stdin.readline):
        work = json.loads(line)
        concurrency = work.pop("concurrency")
        _say(asdict(summarize(await run(target, requests(**work), concurrency))))
    llm.shutdown(timeout=5)


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
