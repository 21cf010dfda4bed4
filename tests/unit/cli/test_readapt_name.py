"""`readapt`: the name a new version gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.commands import readapt
from engine.tuning import training
from engine.tuning.run_folder import RunFolder


def test_a_new_version_goes_to_its_adapter_whatever_the_recipe_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with `--publish helpdesk` by a recipe named support, it stays with helpdesk."""
    published: list[str] = []

    async def publish(_: Path, name: str, *__: Any) -> str:
        published.append(name)
        return f"{name}@v2"

    folder = SimpleNamespace(path=tmp_path, adapter=tmp_path, check_space=lambda _: None)
    monkeypatch.setattr(readapt, "_publish", publish)
    monkeypatch.setattr(RunFolder, "create", lambda *_: folder)
    scores = {"evaluation": {"adapter": 1.0, "rows": 9}}
    monkeypatch.setattr(training, "run", lambda *_: {"run": scores})
    recipe: Any = SimpleNamespace(name="support")
    planned = readapt._Planned("helpdesk@v1", {"recipe": {}, **scores}, recipe, 0, [], [])
    readapt._readapt(planned, tmp_path, tmp_path, None, None)
    assert published == ["helpdesk"]
