"""What our side of the real engine does by itself: stand-ins take the place of vLLM."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.client.testing import write_adapter
from engine.config import Settings
from engine.errors import BadConfiguration, InvalidAdapter
from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.runtime.vllm.engine import VllmEngine
from engine.runtime.vllm.start import _executor

torch = pytest.importorskip("torch")


class StandIn(SimpleNamespace):
    """As much of vLLM's AsyncLLM as starting and stopping ask for."""

    def __init__(self) -> None:
        lora, device = SimpleNamespace(lora_dtype=torch.bfloat16), SimpleNamespace(device_type="cpu")
        super().__init__(
            vllm_config=SimpleNamespace(lora_config=lora, device_config=device),
            model_config=SimpleNamespace(max_model_len=128, get_vocab_size=lambda: 100, dtype=torch.bfloat16),
            get_tokenizer=lambda: None,
            output_handler=None,
            output_processor=SimpleNamespace(propagate_error=lambda _: None),
            shutdown=lambda _: None,
            errored=False,
        )

    async def collective_rpc(self, method: str) -> list[bool]:
        """One worker, which can do everything."""
        return [bool(method)]


class Helper:
    """As much of vLLM's PEFTHelper as preparing asks for."""

    def __init__(self, rank: int, alpha: int) -> None:
        self._answer = rank, alpha / rank

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Helper:
        """Read a PEFT configuration."""
        return cls(config["r"], config["lora_alpha"])

    def get_rank_and_scaling(self, module: str) -> tuple[int, float]:
        """The same for every module."""
        assert module
        return self._answer


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    """An engine without vLLM, whose imports take ten seconds."""
    for name, content in {
        "vllm": {"__version__": "0"},
        "vllm.v1.engine.exceptions": {"EngineDeadError": RuntimeError},
        "vllm.lora.peft_helper": {"PEFTHelper": Helper},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    engine = VllmEngine(Settings(model=tmp_path, registry=str(tmp_path)), tmp_path)
    monkeypatch.setattr(engine, "_build", lambda: setattr(engine, "_llm", StandIn()))
    return engine


async def test_prepares_while_stopped(engine: VllmEngine, tmp_path: Path) -> None:
    """Adapters are prepared between two lives of the engine too, in its precision; what is no adapter is refused."""
    await engine.start()
    assert engine.info.dtype == "bfloat16"
    await engine.stop()
    write_adapter(tmp_path / "adapter")
    files: dict[str, Any] = {name: (tmp_path / "adapter" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    await asyncio.to_thread(engine.prepare, files, tmp_path / "target")
    assert b"BF16" in (tmp_path / "target").read_bytes()
    for wrong in ({CONFIG: b"{}"}, {CONFIG: b"none"}, {WEIGHTS: b"none"}):
        with pytest.raises(InvalidAdapter):
            engine.prepare(files | wrong, tmp_path / "target")
    with pytest.raises(OSError, match="os error 2"):
        engine.prepare(files, tmp_path / "nowhere" / "target")


def test_cores_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of vLLM's own is refused with what to write in it."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "all")
    with pytest.raises(BadConfiguration, match="'all' is no list of cores") as caught:
        _executor()
    assert "0-3,8" in caught.value.fix
