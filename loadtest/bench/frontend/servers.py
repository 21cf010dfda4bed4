"""The servers of the front-end comparison, each a process of its own, with the same engine settings."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from engine.client import AsyncClient
from loadtest.bench.child import Running, start, start_module
from loadtest.bench.engines import EngineSpec, Lora, on_cpu
from loadtest.ports import free_port

# What `vllm serve` runs; the command itself asks for a distribution called "vllm", and the CPU build has another name.
_VLLM_SERVE = "vllm.entrypoints.openai.api_server"
_START_S = 300.0  # longest start


def _lora(spec: EngineSpec) -> Lora:
    if spec.lora is None:
        raise ValueError("a Loraplex server has adapter slots: the others need them too")
    return spec.lora


async def start_loraplex(spec: EngineSpec, scratch: Path) -> Running:
    """`loraplex serve`, ready when its health says SERVING. Raises ContenderDied."""
    port = free_port()
    lora = _lora(spec)
    command = [
        sys.executable, "-m", "engine.cli", "serve", "--model", spec.model, "--port", str(port),
        "--http-port", "0", "--registry", str(scratch / "registry"), "--cache", str(scratch / "cache"),
        "--max-running", str(spec.max_running), "--max-resident", str(lora.slots), "--max-rank", str(lora.rank),
        "--kv-cache-gib", str(spec.kv_cache_gib), "--gpu-memory-share", str(spec.gpu_share), "--log-format", "json",
    ]  # fmt: skip
    running = await start("loraplex serve", command, spec.environment(), scratch, piped=False)
    running.port = port

    async def serving() -> None:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            await client.wait_ready(timeout_s=_START_S)

    return await _until(serving(), running)


async def start_vllm_serve(spec: EngineSpec, scratch: Path, adapters: Mapping[str, Path] | None = None) -> Running:
    """`vllm serve` with adapters by name, ready when /health answers. Raises ContenderDied."""
    port = free_port()
    flags: list[str] = []
    for name, value in spec.engine_args(on_cpu()).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "model" or value is False:
            continue
        flags += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    model = ["--model", spec.model, "--served-model-name", "base"]
    if adapters:
        flags += ["--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in adapters.items())]
    command = [sys.executable, "-m", _VLLM_SERVE, *model, "--port", str(port), "--disable-uvicorn-access-log", *flags]
    environment = spec.environment() | ({"TORCHDYNAMO_DISABLE": "1"} if on_cpu() else {})
    running = await start("vllm serve", command, environment, scratch, piped=False)
    running.port = port

    async def healthy() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                if await _healthy(session, port):
                    return
                await asyncio.sleep(0.1)

    return await _until(healthy(), running)


async def _until(ready: Coroutine[Any, Any, None], running: Running) -> Running:
    """Wait until a server is ready; one that ends before, or takes too long, is stopped. Raises ContenderDied."""
    waiting, ended = asyncio.ensure_future(ready), asyncio.ensure_future(running.process.wait())
    try:
        await asyncio.wait((waiting, ended), timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done() or waiting.exception() is not None:
            raise running.died("did not start")
    except BaseException:
        await running.stop()
        raise
    finally:
        waiting.cancel()
        ended.cancel()
    running.ready()
    return running


async def start_shared(spec: EngineSpec, scratch: Path) -> Running:
    """A Loraplex server that answers on a port, and whose AsyncLLM answers workloads on standard input."""
    lora = _lora(spec)
    settings = {
        "model": spec.model, "registry": str(scratch / "registry"), "cache": str(scratch / "cache"),
        "port": 0, "http_port": 0, "max_running": spec.max_running, "max_resident": lora.slots,
        "max_rank": lora.rank, "kv_cache_gib": spec.kv_cache_gib, "gpu_memory_share": spec.gpu_share,
    }  # fmt: skip
    module = "loadtest.bench.frontend.direct"
    running, facts = await start_module("AsyncLLM in process", module, settings, spec.environment(), scratch)
    running.port = facts["port"]
    return running


async def _healthy(session: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
