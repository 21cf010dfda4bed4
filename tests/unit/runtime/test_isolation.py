"""The isolation check finds what it is there to find."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from engine.runtime.engine import Delta, EngineRequest, LoadedAdapter
from engine.runtime.fake import FakeEngine
from engine.runtime.isolation import TOLERANCES, IsolationCheck, Report
from engine.runtime.strong import write_mixed_adapters

SHAPES = {
    "model.embed_tokens.weight": (100, 16),
    "model.norm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
}


@pytest.fixture
def adapters(tmp_path: Path) -> list[LoadedAdapter]:
    """Five adapters of several kinds."""
    made = write_mixed_adapters(tmp_path, SHAPES, count=5, max_rank=16)
    return [LoadedAdapter(n, f"{chr(96 + n)}@v1#{n}", folder, rank) for n, (folder, rank) in enumerate(made, 1)]


async def run(engine: FakeEngine, adapters: list[LoadedAdapter], slots: int = 3) -> Report:
    """Twenty mixes."""
    return await IsolationCheck(engine, adapters, slots, TOLERANCES["float32"]).run(20)


async def test_an_engine_that_keeps_them_apart(adapters: list[LoadedAdapter]) -> None:
    """All is well; adapters took turns in too few slots, and nothing stays loaded."""
    engine = FakeEngine()
    report = await run(engine, adapters)
    assert report.ok
    assert report.mixes == 20
    assert report.swaps > 20
    assert 0 < report.base_rows < report.rows < report.tokens
    assert not engine.loaded
    assert str(report).startswith("all as alone")


class Mixing(FakeEngine):
    """Gives base requests the adapter that was loaded last, as vLLM's CPU kernels give them the last slot's."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        busy = len(self.running) > 1
        if request.adapter is None and busy and self.loaded:
            request = replace(request, adapter=list(self.loaded.values())[-1])
        async for delta in super().generate(request):
            yield delta


async def test_an_engine_that_mixes_them_up(adapters: list[LoadedAdapter]) -> None:
    """Base requests that were answered by an adapter are found, and whose answer it was is said."""
    report = await run(Mixing(token_interval_s=0.001), adapters)
    assert not report.ok
    assert {mismatch.who for mismatch in report.mismatches} == {"base"}
    named = [mismatch.culprit for mismatch in report.mismatches if mismatch.culprit != "as nobody would alone"]
    assert named
    assert "were answered otherwise than alone" in str(report)


async def test_an_engine_that_fails(adapters: list[LoadedAdapter]) -> None:
    """What the engine raises comes through, and the adapters are unloaded."""
    engine = FakeEngine()
    adapters[3] = replace(adapters[3], folder=adapters[3].folder / "gone")
    with pytest.raises(Exception, match="folder is not there"):
        await run(engine, adapters)
    assert not engine.loaded


def test_made_up_adapters(tmp_path: Path) -> None:
    """They differ in rank and in the layers that they change, and leave embeddings and norms alone."""
    made = write_mixed_adapters(tmp_path, SHAPES, count=8, max_rank=16)
    assert {rank for _, rank in made} == {16, 8, 4, 3}
    layers = []
    for folder, rank in made:
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(rank in tensor.shape for tensor in tensors.values())
        layers.append(frozenset(name.split(".")[-3] for name in tensors))
    assert len(set(layers)) > 2
    assert frozenset().union(*layers) == {"q_proj", "v_proj", "down_proj"}
