"""Invariant 1 on the real engine: a request's answer depends on its own adapter only, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.client import AsyncClient
from engine.registry.fingerprint import check_base
from engine.runtime.engine import LoadedAdapter
from engine.runtime.isolation import TOLERANCES, IsolationCheck
from engine.runtime.strong import write_mixed_adapters
from engine.server.app import App
from tests.e2e.conftest import MODEL

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
    pytest.mark.timeout(1800),  # it takes ten minutes on two cores without AVX-512
]

MIXES = 500


async def test_own_adapter_only_in_random_mixes(app: App, client: AsyncClient, tmp_path: Path) -> None:
    """Strong adapters of several ranks and layers, more than slots, in float32: every token is as alone.

    All slots are taken, the one that the server leaves free included; with vLLM's own CPU kernels one request in five,
    every one to the base, gets the last slot's adapter: `LORAPLEX_LORA_KERNELS=off loraplex doctor --isolation` shows it.
    """
    for resident in (await client.engine()).resident:
        await client.adapters.unload(f"{resident.name}@{resident.version}")
    _, tensors = check_base(MODEL)
    slots = app.engine.info.slots
    made = write_mixed_adapters(tmp_path, {n: t.shape for n, t in tensors.items()}, slots + 3, app.settings.max_rank)
    adapters = [LoadedAdapter(700_000 + n, f"{f.name}@v1#{n}", f, rank) for n, (f, rank) in enumerate(made)]
    report = await IsolationCheck(app.engine, adapters, slots, TOLERANCES["float32"]).run(MIXES)
    assert report.ok, report
    assert report.mixes == MIXES
    assert report.swaps > MIXES
    assert report.base_rows > MIXES / 2
