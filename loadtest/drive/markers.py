"""Adapters made for load tests: random weights so strong that no two of them, nor the base, answer alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import BadInput

_GAIN = 4.0  # of the template's own strength: answers are noise, but each adapter's own noise


def write_marker(template: Path, folder: Path, seed: int, rank: int, *, broken: bool = False) -> None:
    """Write an adapter with the template's layers, random weights and this rank; a broken one has nan in it.

    Raises BadInput when the template is no PEFT adapter.
    """
    from safetensors.numpy import load_file, save_file

    try:
        config = json.loads((template / "adapter_config.json").read_text())
        tensors = load_file(template / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise BadInput(f"{template} is no adapter to take shapes from: {error}") from error
    rng = np.random.default_rng(seed)
    made = {name: _random(name, tensor, rank, rng) for name, tensor in tensors.items()}
    if broken:
        next(iter(made.values()))[0, 0] = np.nan
    folder.mkdir(parents=True)
    scale = config["lora_alpha"] / config["r"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": scale * rank}))
    save_file(made, folder / "adapter_model.safetensors")
    if (template / "run.json").is_file():
        (folder / "run.json").write_bytes((template / "run.json").read_bytes())


def _random(name: str, like: Any, rank: int, rng: np.random.Generator) -> Any:
    rows, columns = like.shape
    shape = (rank, columns) if "lora_A" in name else (rows, rank)
    spread = float(like.astype(np.float32).std()) * np.sqrt(like.shape[0 if "lora_A" in name else 1] / rank)
    gain = 1.0 if "lora_A" in name else _GAIN
    return (rng.standard_normal(shape) * max(spread, 1e-3) * gain).astype(like.dtype)
