"""Adapters that nobody trained: random, strong and all different, for proofs and benchmarks on any base model.

Each changes the answers so much that one tenant's adapter in another's answer cannot go unseen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.registry.tensor_checks import adaptable_layers

STRENGTH = 0.5  # size of an adapter's change to a layer's output, in units of the layer's input

Shapes = Mapping[str, tuple[int, ...]]
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_strong_adapter(folder: Path, shapes: Shapes, rank: int, layers: Iterable[str] | None, seed: int) -> Path:
    """Write an adapter of that rank in PEFT's format; returns `folder`.

    `shapes` are the base's tensors; `layers` the last names of the linear layers to change ("q_proj"), None for all of them.
    """
    rng = np.random.default_rng(seed)
    targets = sorted(set(layers or adaptable_layers(shapes)))
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in sorted(shapes.items()):
        module = name.removesuffix(".weight")
        if name == module or len(shape) != 2 or module.rpartition(".")[2] not in targets:
            continue
        out_size, in_size = shape
        # A keeps the size of its input, B scales it: the product is STRENGTH times as large as the input.
        down, up = 1 / math.sqrt(in_size), STRENGTH / math.sqrt(rank)
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, down, (rank, in_size)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, up, (out_size, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_mixed_adapters(folder: Path, shapes: Shapes, count: int, max_rank: int) -> list[tuple[Path, int]]:
    """Write `count` adapters of several ranks on several sets of layers; returns their folders and ranks."""
    every = adaptable_layers(shapes)
    attention = [name for name in _ATTENTION if name in every] or list(every)
    kinds = (attention, list(every), attention[:1], [name for name in every if name not in attention] or attention)
    ranks = sorted({max_rank, max(1, max_rank // 2), max(1, max_rank // 4), min(3, max_rank)}, reverse=True)
    made = []
    for number in range(count):
        rank = ranks[number % len(ranks)]
        layers = kinds[(number + number // len(kinds)) % len(kinds)]  # shifted in each round, so that pairs differ
        made.append((write_strong_adapter(folder / f"strong-{number}", shapes, rank, layers, number), rank))
    return made
