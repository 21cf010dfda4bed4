"""The base's fingerprint follows what the model computes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.registry.fingerprint import read_base


def test_fingerprint_ignores_shards_and_folder(make_base: Callable[..., Path]) -> None:
    """The same weights in other files and under another name are the same base."""
    assert read_base(make_base("one")).fingerprint == read_base(make_base("three", shards=3)).fingerprint


def test_fingerprint_sees_one_weight(make_base: Callable[..., Path]) -> None:
    """One changed number is another base."""

    def nudge(tensors: dict) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3

    assert read_base(make_base("one")).fingerprint != read_base(make_base("nudged", change=nudge)).fingerprint


def test_fingerprint_sees_the_precision(make_base: Callable[..., Path]) -> None:
    """The same numbers in half precision are another base."""

    def halve(tensors: dict) -> None:
        tensors.update({name: value.astype("float16") for name, value in tensors.items()})

    assert read_base(make_base("one")).fingerprint != read_base(make_base("half", change=halve)).fingerprint
