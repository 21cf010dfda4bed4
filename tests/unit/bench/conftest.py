"""A tiny base model on disk for the benchmark's tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

SHAPES = {
    "q_proj": (8, 6), "k_proj": (4, 6), "v_proj": (4, 6), "o_proj": (6, 8),
    "gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (6, 10),
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a config and two layers of a Llama, in two shards."""
    folder = tmp_path / "base"
    folder.mkdir()
    for layer in range(2):
        tensors = {f"model.layers.{layer}.self_attn.{name}.weight": np.zeros(shape) for name, shape in SHAPES.items()}
        save_file(tensors, folder / f"model-{layer}.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50}))
    return folder
