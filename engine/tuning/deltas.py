"""What an adapter adds to each weight of its base: scale * B @ A, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from engine.registry.config_checks import LoraConfig, read_config
from engine.registry.file_checks import WEIGHTS

_ANY_RANK = 512
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Deltas:
    """An adapter's folder, read layer by layer when asked."""

    folder: Path
    config: LoraConfig
    modules: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> Deltas:
        """Read configuration and names; raises InvalidAdapter when the configuration is none that can be served."""
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118 - it is no dict
        modules = frozenset(name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in names)
        return cls(folder, read_config(folder, _ANY_RANK), modules)

    def of(self, module: str) -> torch.Tensor:
        """The change of one module's weight, (out, in), float32."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a = file.get_tensor(f"{_PREFIX}{module}.lora_A.weight").float()
            b = file.get_tensor(f"{_PREFIX}{module}.lora_B.weight").float()
        return self.config.scale_of(module) * (b @ a)
