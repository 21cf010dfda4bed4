"""Adapters made for the benchmark: random weights of the right shapes for any Llama-like base, in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WEIGHTS = "adapter_model.safetensors"
_SCALE = 0.02  # of both factors: their product moves activations by about a hundredth, far from overflow in any dtype


def make_adapters(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], rank: int, count: int
) -> list[Path]:
    """Write `count` different adapters below `folder`; the same arguments give the same bytes."""
    return [make_adapter(folder / f"adapter-{seed}", shapes, targets, rank, seed) for seed in range(1, count + 1)]


def make_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], rank: int, seed: int
) -> Path:
    """Write one adapter of `rank` on every layer of the base whose last name is in `targets`.

    `shapes` are the base's tensors, weights as (out, in). Raises ValueError when a target names no layer of the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(shapes, targets, rank, seed), folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _tensors(
    shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], rank: int, seed: int
) -> dict[str, np.ndarray]:
    """lora_A of (rank, in) and lora_B of (out, rank) for each targeted layer, float16."""
    rng = np.random.default_rng([seed, rank])
    tensors: dict[str, np.ndarray] = {}
    for target in targets:
        layers = [name for name in sorted(shapes) if name.endswith(f".{target}.weight")]
        if not layers:
            raise ValueError(f"the base has no layer {target!r}")
        for name in layers:
            rows, columns = shapes[name]
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = rng.standard_normal(shape, dtype=np.float32) * _SCALE
                tensors[f"{module}.lora_{side}.weight"] = values.astype(np.float16)
    return tensors
