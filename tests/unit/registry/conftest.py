"""A tiny base model and adapters for it, built in the test's own folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.registry.checks import CheckedAdapter, Limits, check_adapter
from engine.registry.fingerprint import Base, read_base
from engine.registry.registry import Registry
from engine.registry.store import Store

HIDDEN, KV, WIDE, VOCAB = 16, 8, 32, 24
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
LIMITS = Limits(max_rank=16, max_bytes=10_000_000)
Tensors = dict[str, np.ndarray]


def random(shape: tuple[int, ...], seed: object) -> np.ndarray:
    """Repeatable numbers."""
    return np.random.default_rng(abs(hash_of(seed))).normal(size=shape).astype(np.float32)


def hash_of(value: object) -> int:
    """A seed that does not change between processes."""
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:6], "big")


def base_tensors(layers: int = 2, seed: int = 0) -> Tensors:
    """Weights of a llama-like model."""
    found = {"model.embed_tokens.weight": random((VOCAB, HIDDEN), seed), "model.norm.weight": random((HIDDEN,), seed)}
    for layer in range(layers):
        for module, shape in LAYER.items():
            name = f"model.layers.{layer}.{module}.weight"
            found[name] = random(shape, (name, seed))
    return found


def write_base(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    """Write a model folder with its weights in so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": HIDDEN}))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    for shard in range(shards):
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / f"model-{shard}.safetensors")
    return folder


@dataclass
class AdapterFolder:
    """An adapter to be written: a valid one, until a test changes it."""

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    files: dict[str, bytes] = field(default_factory=dict)

    def write(self) -> Path:
        """Write it in PEFT's format."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "adapter_model.safetensors")
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)
        return self.folder


def valid_adapter(folder: Path, rank: int = 4, seed: int = 0, layers: int = 2) -> AdapterFolder:
    """An adapter for the attention's q and v of every layer."""
    tensors: Tensors = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            rows, columns = LAYER[f"self_attn.{module}"]
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = random((rank, columns), (name, "A", seed))
            tensors[f"{name}.lora_B.weight"] = random((rows, rank), (name, "B", seed))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "init_lora_weights": True,
        "base_model_name_or_path": "tiny",
    }
    return AdapterFolder(folder, config, tensors)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """The served base."""
    return read_base(write_base(tmp_path / "tiny", base_tensors()))


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterFolder:
    """A valid adapter, not yet written."""
    return valid_adapter(tmp_path / "adapter")


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes other bases."""

    def make(name: str, shards: int = 1, change: Callable[[Tensors], object] = lambda _: None) -> Path:
        tensors = base_tensors()
        change(tensors)
        return write_base(tmp_path / "bases" / name, tensors, shards)

    return make


@pytest.fixture
def make_checked(tmp_path: Path, base: Base) -> Callable[..., tuple[Path, CheckedAdapter]]:
    """Write and check an adapter; another seed gives other bytes."""

    def make(seed: int = 0) -> tuple[Path, CheckedAdapter]:
        folder = valid_adapter(tmp_path / f"adapter-{seed}", seed=seed).write()
        return folder, check_adapter(folder, base, LIMITS, base.fingerprint)

    return make


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once on disk and once in memory."""
    return Store.open(tmp_path / "registry" if request.param == "folder" else "memory://")


@pytest.fixture
def registry(store: Store) -> Registry:
    """An empty registry."""
    return Registry(store)
