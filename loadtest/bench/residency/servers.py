"""A Loraplex server with a thousand small adapters in its registry, and vLLM with the same ones, each a process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

from engine.client import AsyncClient
from loadtest.bench.adapters.weights import make_adapter
from loadtest.bench.child import start
from loadtest.bench.engines import tensor_shapes
from loadtest.ports import free_port

RANK, TARGETS = 8, ("q_proj", "v_proj")  # PEFT's usual layers: 0.9 MB an adapter of SmolLM2-135M
_START_S = 300.0


def name_of(number: int) -> str:
    """The adapter's name; numbers begin with 1, the most popular."""
    return f"a{number:04}"


def folders(root: Path, model: Path, count: int) -> list[Path]:
    """Adapter folders below `root`, written unless they are there."""
    shapes = tensor_shapes(model)
    made = []
    for number in range(1, count + 1):
        folder = root / name_of(number)
        made.append(folder)
        if not (folder / "adapter_config.json").is_file():
            make_adapter(folder, shapes, TARGETS, RANK, seed=number)
    return made


@asynccontextmanager
async def loraplex(
    model: Path, root: Path, scratch: Path, environment: Mapping[str, str] = MappingProxyType({}), **settings: object
) -> AsyncIterator[str]:
    """`loraplex serve` on the registry and cache below `root`, for the time of the block; gives its address."""
    port = free_port()
    flags = {
        "model": model, "registry": root / "registry", "cache": root / "cache", "port": port, "http_port": 0,
        "max_rank": RANK, "kv_cache_gib": 1, "log_format": "json", "prefix_cache": False, "max_waiting": 4096,
        **settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "engine.cli", "serve"]
    for flag, value in flags.items():
        flag = flag.replace("_", "-")
        command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    running = await start("loraplex serve", command, environment, scratch, piped=False)
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            ready = asyncio.create_task(client.wait_ready(timeout_s=_START_S))
            ended = asyncio.create_task(running.process.wait())
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done() or ready.exception():
                ready.cancel()
                raise running.died("did not start")
            ended.cancel()
        yield f"127.0.0.1:{port}"
    finally:
        await running.stop()


async def publish(address: str, made: Sequence[Path], on_done: Callable[[], None] = lambda: None) -> None:
    """Publish what the registry has not yet."""
    async with AsyncClient(address, timeout_s=120) as client:
        known = {summary.name for summary in await client.adapters.list()}
        places = asyncio.Semaphore(3)

        async def one(folder: Path) -> None:
            async with places:
                if folder.name not in known:
                    await client.adapters.publish(folder, folder.name, publisher="bench")
            on_done()

        await asyncio.gather(*(one(folder) for folder in made))
