"""The three servers of the benchmark, each a process of its own, with the same engine settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from engine.client import AsyncClient

# What `vllm serve` runs; the command itself asks for a distribution called "vllm", and the CPU build has another name.
_VLLM_SERVE = "vllm.entrypoints.openai.api_server"
_START_S = 300.0  # longest start
_STOP_S = 30.0  # longest stop


@dataclass
class Running:
    """A started process, and how long it took until it was ready."""

    process: asyncio.subprocess.Process
    ready_s: float
    port: int = 0

    async def stop(self) -> None:
        """End it politely, then whatever it has left behind: vLLM's own processes outlive a parent that was killed."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # the in-process engine ends with its input
        elif self.process.returncode is None:
            self.process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), _STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.communicate()


@dataclass(frozen=True)
class EngineSettings:
    """What all three have in common."""

    model: Path
    max_running: int
    max_resident: int
    max_rank: int
    kv_cache_gib: int
    step_tokens: int

    @property
    def environment(self) -> dict[str, str]:
        """For every process: no hub, the same cache size, quiet."""
        return os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }

    def engine_args(self, target_modules: list[str]) -> dict[str, Any]:
        """As arguments of vLLM's AsyncEngineArgs."""
        return {
            "model": str(self.model),
            "max_num_seqs": self.max_running,
            "enable_lora": True,
            "max_loras": self.max_resident + 1,
            "max_cpu_loras": self.max_resident + 1,
            "max_lora_rank": self.max_rank,
            "lora_target_modules": target_modules,
            "max_num_batched_tokens": self.step_tokens,
            "enforce_eager": True,
        }


async def start_loraplex(settings: EngineSettings, scratch: Path) -> Running:
    """`loraplex serve`, ready when its health says SERVING."""
    port = free_port()
    command = [
        sys.executable, "-m", "engine.cli", "serve", "--model", str(settings.model), "--port", str(port),
        "--http-port", "0", "--registry", str(scratch / "registry"), "--cache", str(scratch / "cache"),
        "--max-running", str(settings.max_running), "--max-resident", str(settings.max_resident),
        "--max-rank", str(settings.max_rank), "--kv-cache-gib", str(settings.kv_cache_gib), "--log-format", "json",
    ]  # fmt: skip
    running = await _start(command, settings, port, scratch / "loraplex.log")
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        await client.wait_ready(timeout_s=_START_S)
    running.ready_s = time.perf_counter() - running.ready_s
    return running


async def start_vllm_serve(settings: EngineSettings, target_modules: list[str], scratch: Path) -> Running:
    """`vllm serve`, ready when /health answers."""
    port = free_port()
    flags: list[str] = []
    for name, value in settings.engine_args(target_modules).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "model" or value is False:
            continue
        flags += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    model = ["--model", str(settings.model), "--served-model-name", "base"]
    command = [sys.executable, "-m", _VLLM_SERVE, *model, "--port", str(port), "--disable-uvicorn-access-log", *flags]
    running = await _start(command, settings, port, scratch / "vllm-serve.log")
    async with aiohttp.ClientSession() as session:
        while not await _healthy(session, port):
            if running.process.returncode is not None or time.perf_counter() - running.ready_s > _START_S:
                raise RuntimeError(f"vllm serve did not start: {(scratch / 'vllm-serve.log').read_text()[-1000:]}")
            await asyncio.sleep(0.1)
    running.ready_s = time.perf_counter() - running.ready_s
    return running


async def start_shared(settings: EngineSettings, scratch: Path) -> Running:
    """A Loraplex server that answers on a port, and whose AsyncLLM answers workloads on standard input."""
    arguments = {
        "model": str(settings.model), "registry": str(scratch / "registry"), "cache": str(scratch / "cache"),
        "port": 0, "http_port": 0, "max_running": settings.max_running, "max_resident": settings.max_resident,
        "max_rank": settings.max_rank, "kv_cache_gib": settings.kv_cache_gib,
    }  # fmt: skip
    command = [sys.executable, "-m", "loadtest.direct", json.dumps(arguments)]
    running = await _start(command, settings, 0, scratch / "direct.log")
    running.port = (await _reply(running))["port"]
    running.ready_s = time.perf_counter() - running.ready_s
    return running


async def ask_direct(running: Running, work: dict[str, Any]) -> dict[str, Any]:
    """Have the in-process engine run a workload; returns its summary."""
    if running.process.stdin is None:
        raise RuntimeError("the process has no standard input")
    running.process.stdin.write(json.dumps(work).encode() + b"\n")
    await running.process.stdin.drain()
    return await _reply(running)


async def _reply(running: Running) -> dict[str, Any]:
    while running.process.stdout is not None:
        line = await running.process.stdout.readline()
        if line.startswith(b"{"):
            reply: dict[str, Any] = json.loads(line)
            return reply
        if not line:
            break
    raise RuntimeError("the in-process engine ended; see direct.log")


async def _start(command: list[str], settings: EngineSettings, port: int, log: Path) -> Running:
    started = time.perf_counter()
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if port == 0 else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if port == 0 else errors,
            stderr=errors,
            env=settings.environment,
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
    return Running(process, started, port)


async def _healthy(session: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
