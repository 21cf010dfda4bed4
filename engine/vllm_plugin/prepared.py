"""An adapter as the engine's slots hold it: one file of numbers in the engine's precision, that is only copied.

A safetensors file with one tensor, `data`: of each module A (rank, in), then B (out, rank) with its scale multiplied in. Its
metadata says, for each module, the rank, the layer's size (in, out) and where in `data` its numbers begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DATA, _MODULES = "data", "modules"
_SIDES = {"lora_A": 0, "lora_B": 1}

Place = tuple[int, int, int, int]  # rank, in, out, where A begins; B follows


def write(weights: bytes, scale_of: Callable[[str], float], dtype: Any, target: Path) -> None:
    """Convert a PEFT weights file. Precision first, then scale: in vLLM's order, so that every bit is as vLLM's.

    `scale_of` is told a module as PEFT names it, without "base_model.model.".
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save_file

    pairs: dict[str, list[Any]] = {}
    for name, tensor in sorted(load(weights).items()):  # safetensors gives them in another order each time
        module, side = name.removesuffix(".weight").rsplit(".", 1)
        pairs.setdefault(module.removeprefix("base_model.model."), [None, None])[_SIDES[side]] = tensor.to(dtype)
    places: dict[str, Place] = {}
    parts, end = [], 0
    for module, (a, b) in pairs.items():
        scale = scale_of(module)
        places[module] = (a.shape[0], a.shape[1], b.shape[0], end)
        parts += [a.reshape(-1), (b if scale == 1 else b * scale).reshape(-1)]
        end += a.numel() + b.numel()
    metadata = {_MODULES: json.dumps(places, separators=(",", ":"))}
    try:
        save_file({_DATA: torch.cat(parts)}, target, metadata)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(str(error)) from error


def read(path: str) -> tuple[Any, dict[str, Place]]:
    """The numbers, mapped and not yet read, and where each module's are."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(_DATA), json.loads(file.metadata()[_MODULES])
