"""The adapters made for the benchmark fit their base and are the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from loadtest.bench.adapters.weights import make_adapter, make_adapters
from loadtest.bench.engines import ALL_LINEAR, ATTENTION, tensor_shapes

A, B = (
    "base_model.model.model.layers.1.self_attn.{}.lora_A.weight",
    "base_model.model.model.layers.1.self_attn.{}.lora_B.weight",
)


@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR], ids=["attention", "all-linear"])
def test_every_targeted_layer_has_both_factors_in_the_bases_shape(base: Path, targets: tuple[str, ...]) -> None:
    """A is (rank, in) and B is (out, rank), for the targets of every layer and nothing else."""
    shapes = tensor_shapes(base)
    tensors = load_file(make_adapter(base / "made", shapes, targets, 3, seed=1) / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(targets)
    for target in targets:
        rows, columns = shapes[f"model.layers.1.self_attn.{target}.weight"]
        assert tensors[A.format(target)].shape == (3, columns)
        assert tensors[B.format(target)].shape == (rows, 3)


def test_weights_are_finite_small_and_not_zero(base: Path) -> None:
    """An adapter changes something, and overflows nothing."""
    tensors = load_file(make_adapter(base / "made", tensor_shapes(base), ATTENTION, 4, 1) / "adapter_model.safetensors")
    for tensor in tensors.values():
        assert np.isfinite(tensor).all()
        assert 0 < np.abs(tensor).max() < 0.2


def test_adapters_differ_and_are_made_alike_again(base: Path) -> None:
    """The seed alone decides."""
    shapes = tensor_shapes(base)
    first, second = make_adapters(base / "one", shapes, ATTENTION, 4, 2)
    again, _ = make_adapters(base / "two", shapes, ATTENTION, 4, 2)
    content = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second, again)]
    assert content[0] == content[2] != content[1]


def test_the_config_is_pefts(base: Path) -> None:
    """PEFT itself reads it, with the rank and layers that were asked for."""
    folder = make_adapter(base / "made", tensor_shapes(base), ATTENTION, 16, 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], tuple(config["target_modules"])) == ("LORA", 16, ATTENTION)


def test_a_target_that_the_base_lacks_is_named(base: Path) -> None:
    """A base of another architecture is refused before anything is started."""
    with pytest.raises(ValueError, match="c_attn"):
        make_adapter(base / "made", tensor_shapes(base), ("c_attn",), 4, 1)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """The message says what is missing."""
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        tensor_shapes(tmp_path)
