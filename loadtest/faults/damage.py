"""How an adapter's weights file goes bad."""

# ruff: noqa: ARG001 - every damage is told the same

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"

Damage = Callable[[Path, Path, random.Random], None]  # (the file, another adapter's, chance)


def vanish(file: Path, other: Path, rng: random.Random) -> None:
    """It is gone."""
    file.unlink()


def truncate(file: Path, other: Path, rng: random.Random) -> None:
    """Its end is missing."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def swap(file: Path, other: Path, rng: random.Random) -> None:
    """It is another adapter's: valid, and wrong."""
    _replace(file, other.read_bytes())


def poison(file: Path, other: Path, rng: random.Random) -> None:
    """Many of its numbers are NaN (all bits set, in every precision)."""
    content = bytearray(file.read_bytes())
    begin = int.from_bytes(content[:8], "little") + 8
    for _ in range(16):
        at = rng.randrange(begin, len(content) - 64)
        content[at : at + 64] = b"\xff" * 64
    _replace(file, bytes(content))


def flip(file: Path, other: Path, rng: random.Random) -> None:
    """One of its bytes is another."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    _replace(file, bytes(content))


def _replace(file: Path, content: bytes) -> None:
    """Write beside it and rename, so that the bytes that a running engine has mapped stay what they were."""
    beside = file.with_suffix(".new")
    beside.write_bytes(content)
    beside.rename(file)


DAMAGES: tuple[Damage, ...] = (vanish, truncate, swap, poison, flip)
