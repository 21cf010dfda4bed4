"""vLLM alone, as a process: the same callers on AsyncLLM, adapters named by their folders and loaded when vLLM likes.

    python -m loadtest.bench.residency.stock '{"engine": {...}, "adapters": ["FOLDER", ...]}'

A question is {"adapters": how many, "callers": ..., "exponent": ..., "settle_s": ..., "seconds": ...}.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop

from loadtest.bench.backends import InProcessBackend
from loadtest.bench.child import Handler, Stop, serve
from loadtest.bench.engines import EngineSpec, build, facts, stopping
from loadtest.bench.residency.load import Group, watch


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Start the engine; returns what it is, who answers, and how it stops."""
    llm = build(EngineSpec.from_json(arguments["engine"]))
    backend = InProcessBackend(llm, arguments["adapters"])

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        names = [str(number) for number in range(1, question["adapters"] + 1)]
        group = Group(backend, question["callers"], names, question["exponent"])
        (seen,) = await watch([group], question["seconds"], question["settle_s"])
        return {
            "tokens_per_s": seen.tokens_per_s,
            "ttft_p50_ms": seen.ttft(50),
            "ttft_p99_ms": seen.ttft(99),
            "errors": len(seen.errors),
        }

    return facts(llm), answer, stopping(llm)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(prepare))
