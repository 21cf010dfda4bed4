"""Signing what is published, without writing into the user's folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def signed(folder: Path, private_key: Path | None) -> Iterator[Path]:
    """The folder as it is, or with a key a copy of it that holds its signature."""
    if private_key is None:
        yield folder
        return
    from engine.registry.signatures import sign

    with tempfile.TemporaryDirectory(prefix="loraplex-sign-") as scratch:
        copy = Path(scratch) / "adapter"
        shutil.copytree(folder, copy)
        sign(copy, private_key)
        yield copy
