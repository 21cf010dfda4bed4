"""One tiny base for all tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.unit.tuning.tiny import write_base, write_recipe


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """What is this small only waits for a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; nobody changes it."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    """Its tokenizer: one token a byte."""
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def recipe_file(tmp_path: Path, base: Path) -> Path:
    """A recipe that is right."""
    return write_recipe(tmp_path, base)
