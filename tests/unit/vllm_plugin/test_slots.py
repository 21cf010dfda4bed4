"""Adapters copied into slots: what is in a slot afterwards is the adapter and nothing of the one before it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from engine.vllm_plugin import prepared
from engine.vllm_plugin.worker import SlotWriter

SLOTS, MAX_RANK = 3, 8
SIZES = {"m.q": (16, 12), "m.k": (16, 4), "m.o": (12, 16)}  # in, out


class Manager:
    """The parts of vLLM's LoRA manager that matter: layers with slots, and who is in which."""

    def __init__(self) -> None:
        qkv, o = self.layer("m.q", "m.k"), self.layer("m.o")
        self.modules = {"m.qk": qkv, "m.o": o}
        self.packed_modules = {"m.qk": ["m.q", "m.k"]}
        self.model = SimpleNamespace()
        self.lora_slots = SLOTS
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self._registered_adapters: dict[int, Any] = {}
        self._active_adapters: dict[int, None] = {}

    @staticmethod
    def layer(*parts: str) -> Any:
        """A layer with slots for these parts."""
        a = tuple(torch.zeros(SLOTS, 1, MAX_RANK, SIZES[part][0]) for part in parts)
        b = tuple(torch.zeros(SLOTS, 1, SIZES[part][1], MAX_RANK) for part in parts)
        return SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b, tp_size=1)

    def list_adapters(self) -> dict[int, Any]:
        """Who is registered."""
        return self._registered_adapters

    def remove_adapter(self, number: int) -> None:
        """As vLLM does: the slot is free, and what is in it stays."""
        self._registered_adapters.pop(number)
        self._active_adapters.pop(number)
        self.lora_index_to_id[self.lora_index_to_id.index(number)] = None

    def slot(self, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each part in an adapter's slot."""
        at = self.lora_index_to_id.index(number)
        qk, o = self.modules["m.qk"], self.modules["m.o"]
        layers = {"m.q": (qk, 0), "m.k": (qk, 1), "m.o": (o, 0)}
        return {m: (layer.lora_a_stacked[i][at, 0], layer.lora_b_stacked[i][at, 0]) for m, (layer, i) in layers.items()}


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing vLLM takes seconds: what is needed of it is little."""
    for name in ("vllm", "vllm.lora", "vllm.lora.lora_model", "vllm.lora.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.lora.lora_model"].LoRAModel = lambda *arguments: arguments  # type: ignore[attr-defined]
    sys.modules["vllm.lora.utils"].parse_fine_tuned_lora_name = (  # type: ignore[attr-defined]
        lambda name, _: (name.removeprefix("base_model.model.").rsplit(".", 2)[0], True)
    )


def made(
    folder: Path, seed: int, rank: int, modules: tuple[str, ...] = ("m.q", "m.k", "m.o"), scale: float = 2.0
) -> Path:
    """A prepared adapter."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        columns, rows = SIZES.get(module, (16, 16))
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=random)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
    target = folder / f"{seed}"
    prepared.write(save(tensors), lambda _: scale, torch.float32, target)
    return target


def right(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a slot must hold."""
    data, places = prepared.read(str(path))
    full = {name: (torch.zeros(MAX_RANK, i), torch.zeros(o, MAX_RANK)) for name, (i, o) in SIZES.items()}
    for module, (rank, columns, rows, at) in places.items():
        full[module][0][:rank] = data[at : at + rank * columns].view(rank, columns)
        full[module][1][:, :rank] = data[at + rank * columns : at + rank * (columns + rows)].view(rows, rank)
    return full


def assert_holds(manager: Manager, number: int, path: Path) -> None:
    """The slot is the adapter's, to the last number."""
    for module, (a, b) in right(path).items():
        assert torch.equal(manager.slot(number)[module][0], a)
        assert torch.equal(manager.slot(number)[module][1], b)


def test_one_after_the_other(tmp_path: Path) -> None:
    """Whoever was in a slot before, with more ranks, more layers or NaN, has left nothing."""
    manager = Manager()
    writer = SlotWriter(manager)
    kinds = [(8, ("m.q", "m.k", "m.o")), (3, ("m.k",)), (5, ("m.q", "m.o")), (8, ("m.o",)), (1, ("m.q", "m.k"))]
    for number, (rank, modules) in enumerate(kinds * 2, 1):
        path = made(tmp_path, number, rank, modules)
        writer.copy(number, str(path))
        assert_holds(manager, number, path)
        if number > 1:
            assert_holds(manager, number - 1, tmp_path / f"{number - 1}")
            for module in kinds[(number - 2) % 5][1]:
                for tensor in manager.slot(number - 1)[module]:
                    tensor[tensor != 0] = float("nan")
            manager.remove_adapter(number - 1)
    assert len(manager.list_adapters()) == 1


def test_every_layer_is_seen_to_change(tmp_path: Path) -> None:
    """Our kernels learn of a change by the version of a layer's first A, even if an adapter leaves that part alone."""
    manager = Manager()
    before = [layer.lora_a_stacked[0]._version for layer in manager.modules.values()]
    SlotWriter(manager).copy(1, str(made(tmp_path, 1, 4, ("m.k",))))
    after = [layer.lora_a_stacked[0]._version for layer in manager.modules.values()]
    assert all(new > old for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("wrong", ["rank", "unknown layer", "same id", "no slot"])
def test_what_does_not_fit(tmp_path: Path, wrong: str) -> None:
    """It is refused, takes no slot, and whoever gets the slot next is right."""
    manager = Manager()
    writer = SlotWriter(manager)
    good = made(tmp_path, 1, 4)
    bad = made(tmp_path, 2, 9 if wrong == "rank" else 4, ("m.q", "m.x") if wrong == "unknown layer" else ("m.q", "m.k"))
    writer.copy(1, str(good))
    if wrong == "no slot":
        for number in (7, 8):
            writer.copy(number, str(good))
    with pytest.raises((ValueError, KeyError)):
        writer.copy(1 if wrong == "same id" else 2, str(bad))
    for number in (7, 8):
        if number in manager.list_adapters():
            manager.remove_adapter(number)
    writer.copy(3, str(made(tmp_path, 3, 2, ("m.o",))))
    assert_holds(manager, 3, tmp_path / "3")
    assert_holds(manager, 1, good)


def test_layers_that_are_not_plain() -> None:
    """Where a layer is shared out among devices, or keeps its slots in another way, vLLM has to load."""
    manager = Manager()
    assert SlotWriter(manager).plain
    manager.modules["m.o"].tp_size = 2
    assert not SlotWriter(manager).plain
    manager = Manager()
    manager.modules["m.o"].lora_a_stacked = [[]]
    assert not SlotWriter(manager).plain


def test_prepared_is_precision_then_scale(tmp_path: Path) -> None:
    """B is rounded to the engine's precision before it is scaled, as vLLM does it, so that answers are the same to the bit."""
    b = torch.tensor([[0.1]])
    weights = save({"base_model.model.m.lora_A.weight": b, "base_model.model.m.lora_B.weight": b.clone()})
    prepared.write(weights, lambda module: {"m": 3.0}[module], torch.bfloat16, tmp_path / "x")
    data, places = prepared.read(str(tmp_path / "x"))
    assert data.dtype == torch.bfloat16
    assert places == json.loads('{"m": [1, 1, 1, 0]}')
    assert data[1] == b.bfloat16()[0, 0] * 3.0
