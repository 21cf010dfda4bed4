"""Targets opened for a run: a server that is there, one started for it, or stock vLLM beside it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from engine.client import AsyncClient, Credentials
from loadtest.drive.fleet import fleet
from loadtest.drive.openai import OpenAIServer
from loadtest.drive.own_server import own_server
from loadtest.drive.site import Site, look
from loadtest.drive.targets import TargetSpec
from loadtest.errors import BadInput, TargetGone
from loadtest.plan.scenario import Case

_BASE = "base"  # what stock vLLM calls the base model here


@contextlib.asynccontextmanager
async def remote(target: str, timeout_s: float, model: str, workers: int) -> AsyncIterator[Site]:
    """A server that somebody runs: addresses of replicas, or the URL of an OpenAI server with the base's name there."""
    if target.startswith(("http://", "https://")):
        if not model:
            raise BadInput("an OpenAI server needs --model: its name for the base model")
        async with _openai(target, model, timeout_s, workers) as site:
            yield site
        return
    async with _loraplex(tuple(target.split(",")), timeout_s, workers, Credentials.from_environment()) as site:
        yield site


@contextlib.asynccontextmanager
async def served(
    model: Path, adapters: Sequence[Path], cases: Sequence[Case], engine: str, workers: int,
    settings: Mapping[str, object] | None = None,
) -> AsyncIterator[Site]:  # fmt: skip
    """`loraplex serve` of this model with what the cases need, for the time of a run."""
    async with own_server(_folder(model), adapters, cases, engine, settings) as own:
        async with _loraplex((own.address,), _timeout(cases), workers, Credentials()) as site:
            site.own = own
            yield site


@contextlib.asynccontextmanager
async def stock_vllm(
    model: Path, adapters: Sequence[Path], cases: Sequence[Case], workers: int, ours: Site
) -> AsyncIterator[Site]:
    """VLLM's own OpenAI server with the same adapters, sizes and slots as `ours`, and vLLM's own kernels."""
    from loadtest.bench.child import ContenderDied
    from loadtest.bench.engines import ALL_LINEAR, EngineSpec, Lora
    from loadtest.bench.frontend.servers import start_vllm_serve

    rank = max([16, *(rank for case in cases for rank in case.server.ranks)])
    spec = EngineSpec(
        str(_folder(model)), Lora(ours.slots, rank, ALL_LINEAR, kernels="off"), max_running=ours.callers,
        kv_cache_gib=2, gpu_share=0.4, prefix_cache=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="loraplex-peer-") as folder:
        try:
            running = await start_vllm_serve(spec, Path(folder), fleet(adapters, cases, Path(folder)))
        except ContenderDied as error:
            raise TargetGone(str(error)) from error
        try:
            async with _openai(f"http://127.0.0.1:{running.port}", _BASE, _timeout(cases), workers) as site:
                site.callers, site.slots = ours.callers, ours.slots
                yield site
        finally:
            await running.stop()


def _folder(model: Path) -> Path:
    if not model.is_dir():
        raise BadInput(f"there is no model in {model}", "Run make model, or name another folder.")
    return model.resolve()


def _timeout(cases: Sequence[Case]) -> float:
    return max(case.workload.timeout for case in cases)


@contextlib.asynccontextmanager
async def _loraplex(
    addresses: tuple[str, ...], timeout_s: float, workers: int, known_by: Credentials
) -> AsyncIterator[Site]:
    tls, key = known_by.channel(), known_by.api_key
    async with AsyncClient(addresses[0], timeout_s=timeout_s, credentials=tls, api_key=key) as client:
        site = Site(TargetSpec(addresses, timeout_s, credentials=known_by), client, workers=workers)
        await look(site)
        yield site


@contextlib.asynccontextmanager
async def _openai(url: str, model: str, timeout_s: float, workers: int) -> AsyncIterator[Site]:
    site = Site(TargetSpec((url,), timeout_s, "openai", model), None, workers=workers, peer=OpenAIServer(url, model))
    await look(site)
    yield site
