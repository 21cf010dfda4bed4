"""A contender without a model: answers at once, or ends as its environment says."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from loadtest.bench.child import Handler, Stop, serve


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Say the name that it was given; LORAPLEX_FAKE says when to die."""
    sys.stdout.write("noise on standard output\n")
    if os.environ.get("LORAPLEX_FAKE") == "dies at start":
        sys.exit("no room for another engine")

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        if os.environ.get("LORAPLEX_FAKE") == "dies later":
            raise RuntimeError("the kernel gave up")
        owners = [ask["adapter"] for ask in question["asks"]]
        prompts = [ask["prompt"] for ask in question["asks"]]
        rate = 100.0 if not any(owners) else 90.0
        return {
            "tokens_per_s": rate, "ttft_p50_ms": 1.0, "itl_p50_ms": 2.0, "itl_p99_ms": 3.0,
            "owners": owners, "prompts": prompts,
        }  # fmt: skip

    async def stop() -> None:
        sys.stdout.write("stopped in good order\n")

    facts = {"vllm": "0.0", "torch": "0.0", "device": "cpu", "device_name": "cpu", "dtype": "float32"}
    return facts | {"lora_wrapper": "a.B", "arguments": arguments}, answer, stop


if __name__ == "__main__":
    asyncio.run(serve(prepare))
