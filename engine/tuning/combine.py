"""Several adapters made into one, by PEFT: linear (with concatenation and SVD as exact relatives), TIES, DARE."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from engine.errors import MergeRefused
from engine.registry.config_checks import LoraConfig
from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.tuning.base_model import load_base
from engine.tuning.deltas import Deltas

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "cat", "svd"]
_SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties")
_PRUNING = ("ties", "dare_linear", "dare_ties")


def combine(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float],
    method: str,
    density: float,
    out: Path,
    seed: int = 1,
) -> dict[str, Any]:
    """Write the combination of adapters of one base to the new folder `out`; returns its configuration.

    TIES (Yadav et al., 2023) and DARE (Yu et al., 2024) keep the share `density` of each adapter's values.
    Raises InvalidAdapter when one of them is more than plain LoRA, as for a merge into the base; MergeRefused when ranks differ
    and the method needs equal ones, when PEFT would leave layers out, when the method is unknown or a weight is no number.
    """
    if method not in get_args(Method):
        raise MergeRefused(f"unknown method {method!r}", fix=f"Use one of {', '.join(get_args(Method))}.")
    if len(weights) != len(adapters):
        raise MergeRefused(f"{len(weights)} weights for {len(adapters)} adapters", fix="Give one weight for each.")
    if not all(map(math.isfinite, weights)):
        raise MergeRefused("a weight is no finite number", fix="Give finite --weights.")
    _check_parts([Deltas.read(folder).config for folder in adapters], method)
    torch.manual_seed(seed)  # DARE drops values by chance
    names = [f"part{number}" for number in range(len(adapters))]
    model = PeftModel.from_pretrained(load_base(base, torch.float32), str(adapters[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    options = {"density": density} if method in _PRUNING else {}
    model.add_weighted_adapter(names, list(weights), "combined", combination_type=method, **options)
    _save(model, base, out)
    config: dict[str, Any] = json.loads((out / CONFIG).read_text())
    return config


def _check_parts(configs: Sequence[LoraConfig], method: str) -> None:
    ranks = sorted({rank for config in configs for rank in (config.rank, *config.rank_pattern.values())})
    if method in _SAME_RANK and len(ranks) > 1:  # the result has one rank for all layers
        problem = f"{method} needs adapters of one rank in all layers, and these have {', '.join(map(str, ranks))}"
        raise MergeRefused(problem, fix="Use --method svd, or cat.")
    # PEFT makes the result for the layers that the first one's configuration chooses.
    if len({(config.layers, config.excluded, isinstance(config.targets, str)) for config in configs}) > 1:
        problem = "target_modules, layers_to_transform or exclude_modules choose layers in different ways"
        raise MergeRefused(problem, fix="Combine adapters that were trained on the same layers.")


def _save(model: Any, base: Path, out: Path) -> None:
    config = model.peft_config["combined"]
    config.base_model_name_or_path = base.resolve().name
    config.use_rslora = (
        False  # the parts' scales are in the weights now: PEFT sets alpha to r and keeps the first one's flag
    )
    scratch = out.with_name(out.name + ".partial")
    model.save_pretrained(str(scratch), selected_adapters=["combined"], save_embedding_layers=False)
    (scratch / "README.md").unlink(missing_ok=True)
    weights = scratch / "combined" / WEIGHTS
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"}
    )
    (scratch / "combined").rename(out)
    scratch.rmdir()
