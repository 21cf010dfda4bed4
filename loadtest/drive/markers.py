"""Adapters made for load tests: random weights so strong that no two of them, nor the base, answer alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import BadInput

_STRENGTH = 0.5  # spread of the adapter's change to a weight, of the weight's own usual 1/sqrt(inputs)


def write_marker(template: Path, folder: Path, seed: int, rank: int, *, broken: bool = False) -> None:
    """Write an adapter with the template's layers, random weights and this rank; a broken one has nan in it.

    Raises BadInput when the template is no PEFT adapter.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    try:
        config = json.loads((template / "adapter_config.json").read_text())
        with safe_open(template / "adapter_model.safetensors", "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{template} is no adapter to take shapes from: {error}") from error
    rng = np.random.default_rng(seed)
    scale = config["lora_alpha"] / config["r"]
    made = {name: _random(name, shape, rank, scale, rng) for name, shape in shapes.items()}
    if broken:
        next(iter(made.values()))[0, 0] = np.nan
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": scale * rank}))
    save_file(made, folder / "adapter_model.safetensors")
    if (template / "run.json").is_file():
        (folder / "run.json").write_bytes((template / "run.json").read_bytes())


def _random(name: str, shape: list[int], rank: int, scale: float, rng: np.random.Generator) -> Any:
    """A: 1/sqrt(inputs), so that A x is of order x. B: so that scale x B A has the strength, over `rank` summands."""
    rows, columns = shape
    if "lora_A" in name:
        return (rng.standard_normal((rank, columns)) / np.sqrt(columns)).astype(np.float32)
    return (rng.standard_normal((rows, rank)) * _STRENGTH / (scale * np.sqrt(rank))).astype(np.float32)
