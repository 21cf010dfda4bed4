"""Several adapters as one: each method makes what it is defined to make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import InvalidAdapter, MergeRefused
from engine.tuning.combine import combine
from engine.tuning.deltas import Deltas
from tests.unit.tuning.test_merge import write_adapter

pytestmark = pytest.mark.slow


def ties(parts: Sequence[torch.Tensor], density: float, factors: Sequence[float]) -> torch.Tensor:
    """TIES by hand (Yadav et al., 2023): trim, elect the sign of each value, average what has it."""
    kept = []
    for part in parts:
        least = part.abs().flatten().sort(descending=True).values[int(density * part.numel()) - 1]
        kept.append(torch.where(part.abs() >= least, part, 0.0))
    sign = torch.stack(kept).sum(0).sign()
    agreeing = torch.stack([torch.where(part.sign() == sign, part, 0.0) for part in kept])
    weighted = sum(factor * part for factor, part in zip(factors, agreeing, strict=True))
    return weighted / (agreeing != 0).sum(0).clamp(min=1)


def alike(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Which values the wanted ones were found, rounding to 16 bits aside."""
    return torch.isclose(found, wanted, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "cat", "svd"])
def test_several_adapters_become_one(tmp_path: Path, base: Path, method: str) -> None:
    """By each method's own definition: what it makes of A and B, or of their product."""
    weights, density = (0.7, 0.3), 0.6
    folders = [write_adapter(tmp_path / f"part{n}", base, seed=n) for n in (1, 2)]
    config = combine(base, folders, weights, method, density, tmp_path / "both")
    assert config["r"] == (8 if method == "cat" else 4)
    assert not (tmp_path / "both.partial").exists()
    made, *parts = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "both", *folders))
    both, first, second = (Deltas.read(folder) for folder in (tmp_path / "both", *folders))
    factors = [math.sqrt(2 * weight) for weight in weights]  # alpha is twice the rank
    for module in sorted(both.modules):
        wanted = 0.7 * first.of(module) + 0.3 * second.of(module)
        off = float((both.of(module) - wanted).norm() / wanted.norm())
        lost = torch.linalg.svdvals(wanted)[4:].norm() / wanted.norm()  # what rank 4 has no room for
        if method in ("cat", "svd"):
            assert off == pytest.approx(float(lost) if method == "svd" else 0.0, abs=0.01)
            continue
        for side in ("A", "B"):
            name = f"base_model.model.{module}.lora_{side}.weight"
            own = [part[name] for part in parts]
            x, y = (factor * part for factor, part in zip(factors, own, strict=True))
            found = made[name].float()
            if method in ("linear", "ties"):
                exact = x + y if method == "linear" else ties(own, density, factors)
                assert float(alike(exact, found).float().mean()) > 0.98  # x + y may nearly cancel
                continue
            drawn = [x, y, x + y] if method == "dare_linear" else [x, y, (x + y) / 2]
            cases = torch.stack([alike(each / density, found) for each in (torch.zeros_like(x), *drawn)])
            assert bool(cases.any(0).all())
            assert float(cases.float().flatten(1).mean(1).min()) > 0.04


def test_rank_stabilised_adapters_keep_their_strength(tmp_path: Path, base: Path) -> None:
    """Their scale, alpha by the root of r, is not applied a second time."""
    parts = [
        write_adapter(tmp_path / f"part{n}", base, seed=n, use_rslora=rslora) for n, rslora in ((1, True), (2, False))
    ]
    combine(base, parts, [0.5, 0.5], "cat", 0.6, tmp_path / "both")
    both, first, second = (Deltas.read(folder) for folder in (tmp_path / "both", *parts))
    for module in both.modules:
        wanted = 0.5 * first.of(module) + 0.5 * second.of(module)
        assert float((both.of(module) - wanted).norm() / wanted.norm()) < 0.02


def test_what_cannot_be_combined_is_refused(tmp_path: Path, base: Path) -> None:
    """Different ranks where the method adds them up, an unknown method, weights that do not fit."""
    parts = [write_adapter(tmp_path / f"part{rank}", base, r=rank) for rank in (2, 4)]
    for weights, method, said in (([1, 1], "ties", "one rank"), ([1, 1], "mean", "unknown"), ([1], "svd", "1 weights"),
                                  ([math.nan, 1], "svd", "finite"), ([1, math.inf], "cat", "finite")):  # fmt: skip
        with pytest.raises(MergeRefused, match=said):
            combine(base, parts, weights, method, 0.5, tmp_path / "both")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
    ],
)
def test_a_part_is_checked_as_when_it_is_merged_alone(
    tmp_path: Path, base: Path, settings: dict[str, Any], said: str
) -> None:
    """What is more than plain LoRA was combined as if it were no more."""
    parts = [write_adapter(tmp_path / "plain", base), write_adapter(tmp_path / "other", base, **settings)]
    with pytest.raises(InvalidAdapter, match=said):
        combine(base, parts, [0.5, 0.5], "cat", 0.5, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_ranks_are_compared_in_all_layers(tmp_path: Path, base: Path) -> None:
    """Not only `r`; concatenation takes any."""
    pattern = {"rank_pattern": {"q_proj": 2}}
    parts = [write_adapter(tmp_path / "plain", base), write_adapter(tmp_path / "other", base, seed=1, **pattern)]
    for ones in (parts, [parts[1], parts[1]]):
        with pytest.raises(MergeRefused, match=r"one rank in all layers, and these have 2, 4"):
            combine(base, ones, [0.5, 0.5], "linear", 0.5, tmp_path / "both")
    combine(base, parts, [0.5, 0.5], "cat", 0.5, tmp_path / "both")
    both, first, second = (Deltas.read(folder) for folder in (tmp_path / "both", *parts))
    for module in both.modules:
        wanted = 0.5 * first.of(module) + 0.5 * second.of(module)
        assert float((both.of(module) - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("settings", [{"layers_to_transform": [1]}, {"target_modules": r".*\.(q_proj|down_proj)"}])
def test_no_layer_is_left_out_in_silence(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """PEFT makes the result for the layers of the first part, and cannot join a list with an expression."""
    parts = [write_adapter(tmp_path / "all", base), write_adapter(tmp_path / "other", base, **settings)]
    for ones in (parts, parts[::-1]):
        with pytest.raises(MergeRefused, match="choose layers in different ways"):
            combine(base, ones, [0.5, 0.5], "cat", 0.5, tmp_path / "both")
