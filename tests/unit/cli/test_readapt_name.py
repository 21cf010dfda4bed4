"""`readapt`: the name a new version gets, and what is told of those that get none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.commands import readapt
from engine.errors import RegistryUnavailable
from engine.tuning import training
from engine.tuning.run_folder import RunFolder
from tests.unit.cli.calls import call


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> readapt._Planned:
    """A version whose training is over at once, in `tmp_path`."""
    folder = SimpleNamespace(path=tmp_path, adapter=tmp_path, check_space=lambda _: None)
    monkeypatch.setattr(RunFolder, "create", lambda *_: folder)
    scores = {"evaluation": {"adapter": 1.0, "rows": 9}}
    monkeypatch.setattr(training, "run", lambda *_: {"run": scores})
    recipe: Any = SimpleNamespace(name="support", base="new")
    return readapt._Planned("helpdesk@v1", {"recipe": {}, **scores}, recipe, 0, [], [])


def test_a_new_version_goes_to_its_adapter_whatever_the_recipe_is_called(
    planned: readapt._Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with `--publish helpdesk` by a recipe named support, it stays with helpdesk."""
    published: list[str] = []

    async def publish(_: Path, name: str, *__: Any) -> str:
        published.append(name)
        return f"{name}@v2"

    monkeypatch.setattr(readapt, "_publish", publish)
    results: list[dict[str, Any]] = []
    readapt._readapt(planned, tmp_path, tmp_path, None, None, results)
    assert published == ["helpdesk"]
    assert [(result["published"], result["refused"]) for result in results] == [("helpdesk@v2", "")]


@pytest.mark.parametrize(("broken", "verdicts"), [("_publish", 1), ("_told", 0)])
def test_where_a_run_is_is_told_when_what_comes_after_it_fails(
    planned: readapt._Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, verdicts: int
) -> None:
    """It was trained for hours: its folder is in the table, to be published by hand."""

    def fail(*_: Any) -> None:
        raise RegistryUnavailable("publishing", "it is full")

    monkeypatch.setattr(readapt, broken, fail)
    results: list[dict[str, Any]] = []
    with pytest.raises(RegistryUnavailable):
        readapt._readapt(planned, tmp_path, tmp_path, None, None, results)
    (result,) = results
    assert (result["published"], result["folder"], len(result["verdicts"])) == (None, str(tmp_path), verdicts)
    table, *_ = readapt._outcome(results)
    assert f"it failed: {tmp_path}" in list(table.columns[-1].cells)  # type: ignore[union-attr]


def test_a_folder_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    """A new version would have no name to go to."""
    shown = call("readapt", "./folder", "--held-out-only", "--new-base", tmp_path, "--registry", tmp_path)
    assert (shown.code, "'./folder' is no adapter name" in shown.err) == (1, True)


def test_a_version_that_is_named_twice_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same word, or by name and by version."""

    @contextmanager
    def fetched(refs: list[str], _: Any) -> Iterator[list[Any]]:
        yield [SimpleNamespace(ref=f"{ref.partition('@')[0]}@v1") for ref in refs]

    began: list[str] = []
    monkeypatch.setattr("engine.commands.fetched.fetched", fetched)
    monkeypatch.setattr(readapt, "_plan", lambda version, *_, **__: version)
    monkeypatch.setattr(readapt, "_readapt", lambda one, *_: began.append(one.ref))
    assert call("readapt", "tiny", "tiny@v1", "tiny@v1", "other", "--new-base", tmp_path).code == 0
    assert began == ["tiny@v1", "other@v1"]
