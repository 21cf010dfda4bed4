"""A new base: versions that do not fit are named with the reason, and trained again from what they themselves record."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from engine.errors import InvalidRecipe
from engine.registry.fingerprint import read_base
from engine.registry.signatures import verify
from engine.tuning import rebase, training
from engine.tuning.rebase import Verdict, find_data, fit_of, own_data, recipe_for, refusal, stored_suites
from engine.tuning.recipe import load_recipe, written_recipe
from engine.tuning.run_folder import RunFolder
from engine.tuning.session import Session
from tests.unit.cli.calls import call
from tests.unit.registry.test_signatures import write_keys
from tests.unit.tuning.tiny import write_base, write_recipe

pytestmark = pytest.mark.slow


def trained(folder: RunFolder) -> dict[str, Any]:
    """Train in this process."""
    session = Session(folder, lambda _: None)
    session.prepare()
    session.learn()
    return session.finish()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A registry with one version, trained by its recipe, and the data beside it."""
    home = tmp_path_factory.mktemp("home")
    file = write_recipe(home, base, train={"steps": 60, "learning_rate": 0.02})
    folder = RunFolder.create(home / "runs", load_recipe(file), written_recipe(file))
    trained(folder)
    where = ("--registry", home / "registry", "--model", base)
    assert call("adapters", "publish", folder.adapter, "tiny", *where).code == 0
    shutil.copytree(folder.adapter, home / "again")
    (home / "again" / "README.md").write_text("other bytes")
    return home


def test_versions_are_judged_against_a_new_base(published: Path, base: Path, tmp_path: Path) -> None:
    """Its own base fits; other weights do not, nor other layers; the reason is said, and the exit code is 1."""
    registry = ("--registry", published / "registry")
    assert call("base", "check", "--new", base, *registry).code == 0
    other = call("base", "check", "--new", write_base(tmp_path / "other", seed=5), *registry)
    assert (other.code, "trained on other weights" in other.out) == (1, True)
    assert call("adapters", "publish", published / "again", "tiny", *registry, "--model", base).code == 0
    (current,) = call("base", "check", "--new", base, *registry, "--json").json
    both = call("base", "check", "--new", base, "--all", *registry, "--json").json
    assert (current["ref"], [fit["ref"] for fit in both]) == ("tiny@v1", ["tiny@v1", "tiny@v2"])
    smaller = call("base", "check", "--new", write_base(tmp_path / "smaller", layers=1), *registry)
    assert (smaller.code, "other layers" in smaller.out) == (1, True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recipe": {"lr": 1e-4}, "data": "tickets-2024"}, "no stored recipe"),
        ({"recipe": {"lr": 1e-4}}, "cannot be followed (lr: unknown key"),
        (
            {"recipe": {"name": "tiny", "base": "b", "data": {"train": "t"}}, "data": {"train": {"rows": 3}}},
            "the digests",
        ),
        ({"data": {"train": "sha256:abc"}}, "the digests"),
        ({"evaluation": {"loss": 1.0}}, "no score"),
    ],
    ids=["data-is-text", "other-recipe", "data-is-object", "no-held-out", "no-score"],
)
def test_only_what_can_be_trained_again_is_said_to_be(
    published: Path, base: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    """Other tools write a run.json as well; one of them does not keep the others from being trained again."""
    shutil.copytree(published / "again", tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "run.json").read_text()) | changes
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    registry = ("--registry", tmp_path / "registry")
    assert call("adapters", "publish", tmp_path / "adapter", "foreign", *registry, "--model", base).code == 0
    new = ("--new-base", write_base(tmp_path / "new", seed=5))
    (fit,) = call("base", "check", *new, *registry, "--json").json
    assert (fit["fits"], fit["can"], why in fit["why"], "by hand" in fit["why"]) == (False, False, True, True)
    assert call("readapt", *new, *registry, "--json").json == []
    shown = call("readapt", "foreign", *new, *registry)
    assert (shown.code, why in shown.err) == (1, True)


@pytest.mark.parametrize(
    ("precision", "why"), [("full", "tokenizer and precision"), ("nf4-double", "but in nf4-double")]
)
def test_a_version_of_the_same_weights_in_another_precision_is_told_so(base: Path, precision: str, why: str) -> None:
    """It is served on them, and was not trained on what is served: an evaluation says how it does."""
    found = read_base(base)
    fit = fit_of("x@v1", base, found.fingerprint, {"base": {"precision": precision}}, found)
    assert (fit.fits, fit.can, why in fit.why) == (True, False, True)


def _score_as(monkeypatch: pytest.MonkeyPatch, exact: float) -> None:
    """Train in this process, and say that so many held-out answers are right."""

    def run(folder: RunFolder, _: training.OnEvent) -> dict[str, Any]:
        result = trained(folder)
        result["run"]["evaluation"]["adapter"] = exact
        return result

    monkeypatch.setattr(training, "run", run)


@pytest.mark.parametrize(("exact", "good"), [(1.0, True), (0.5, False)])
def test_only_what_is_as_good_is_published(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: float, good: bool
) -> None:
    """Trained by the stored recipe on the data of that digest; the rest stays in its run folder."""
    _score_as(monkeypatch, exact)
    new = write_base(tmp_path / "new", seed=7)
    words = ("readapt", "--new-base", new, "--data", published, "--runs", tmp_path / "runs")
    private, public = write_keys(tmp_path, "ours")
    (result,) = call(*words, "--registry", published / "registry", "--sign", private, "--json").json
    assert result["verdicts"][0]["new"] == exact
    assert (result["published"] is not None) == good
    if good:
        where = ("--registry", published / "registry")
        assert call("adapters", "export", result["published"], tmp_path / "copy", *where).code == 0
        verify(tmp_path / "copy", public, result["published"])
    recipe = json.loads((Path(result["folder"]) / "adapter" / "run.json").read_text())["recipe"]
    assert recipe["data"]["train"] == "train.jsonl"
    assert recipe["base"] == str(new)


@pytest.mark.parametrize(("old", "suite", "published"), [(0.0, None, False), (0.0, 0.0, False), (0.0, 0.5, True)])
def test_what_was_never_right_is_nothing_to_be_as_good_as(old: float, suite: float | None, published: bool) -> None:
    """Free text is hardly ever exact, before and after; a suite that the old version passed at times says more."""
    verdicts = [Verdict("held-out rows", old, 0.0, 100)]
    verdicts += [Verdict("suite", suite, 0.9, 10)] if suite is not None else []
    assert (refusal(verdicts) == "") == published
    assert refusal([*verdicts, Verdict("other", 0.5, 0.4, 10)]) == "not as good"


def test_what_cannot_be_compared_is_not_published(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in its run folder, and why is said."""
    _score_as(monkeypatch, 0.0)
    monkeypatch.setattr(rebase, "on_held_out", lambda *_: Verdict("held-out rows", 0.0, 0.0, 8))
    words = ("--data", published, "--runs", tmp_path / "runs", "--registry", published / "registry")
    shown = call("readapt", "--new-base", write_base(tmp_path / "new", seed=9), *words)
    assert shown.code == 0
    assert "nothing to compare with: no answer of the old one was right" in shown.out
    assert "published by hand: loraplex adapters publish" in shown.out


def test_a_base_whose_checkpoints_do_not_fit_is_told_before_training(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for any training."""
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("it was trained"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    words = ("--data", published, "--runs", tmp_path / "runs", "--registry", published / "registry")
    shown = call("readapt", "--new-base", write_base(tmp_path / "new", seed=9), *words)
    assert (shown.code, "checkpoints takes about" in shown.err) == (1, True)


def test_data_is_found_where_the_recipe_says(tmp_path: Path) -> None:
    """A URL is no folder; one that holds other rows by now, or is not there, is passed over."""
    text = '{"prompt": "a", "completion": "b"}'
    with fsspec.open("memory://own.jsonl", "wt") as file:
        file.write(text)
    run = {"recipe": {"name": "x", "data": {"train": "memory://own.jsonl", "held_out": str(tmp_path / "absent.jsonl")}},
           "data": {"train": _digest(text), "held_out": _digest("other")}}  # fmt: skip
    own = own_data(run)
    assert own == {_digest(text): "memory://own.jsonl"}
    with pytest.raises(InvalidRecipe, match=r"held_out.* nor at .*absent\.jsonl"):
        recipe_for(run, tmp_path, own, "x@v1")
    run["recipe"]["data"]["held_out"] = 0.1  # type: ignore[index]
    assert recipe_for(run, tmp_path, own, "x@v1").data.train == "memory://own.jsonl"


def test_data_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    """As `train` takes any name; files that cannot be read are passed over, hidden ones unless they are called .jsonl."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_text("hidden")
    (tmp_path / ".git" / "rows.jsonl").write_text("likely")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    (tmp_path / "rows.json").write_text("rows")
    names = {"rows": "rows.json", "likely": "rows.jsonl"}
    found = find_data([tmp_path], [_digest(text) for text in ("rows", "likely", "hidden", "absent")])
    assert {digest: path.name for digest, path in found.items()} == {_digest(text): names[text] for text in names}


def test_data_is_found_by_its_digest_and_never_by_its_name(tmp_path: Path) -> None:
    """A changed file of the same name is refused."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "renamed.jsonl").write_text("rows")
    digest = "sha256:d30bc6c6f53c27fcd2e5bfb6de4a0e0f0f3a5d0c5e3a6d3c7f6f2cbbd7f6ae9f"
    (found,) = find_data([tmp_path], [_digest("rows"), digest]).values()
    assert found.name == "renamed.jsonl"
    run = {"recipe": {"name": "x", "data": {"train": "renamed.jsonl"}}, "data": {"train": digest}}
    with pytest.raises(InvalidRecipe, match="is not in the folders"):
        recipe_for(run, tmp_path, {}, "x@v1")
    with pytest.raises(InvalidRecipe, match="no stored recipe"):
        recipe_for({}, tmp_path, {}, "x@v1")


def test_data_is_found_however_it_is_packed(tmp_path: Path) -> None:
    """Training data is known by its text: compressed, or with the line ends of another system, it is the same."""
    text = '{"prompt": "a", "completion": "b"}\n'
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert find_data([tmp_path], [_digest(text)])[_digest(text)].name == "packed.jsonl.gz"
    (tmp_path / "crlf.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    assert find_data([tmp_path], [_digest(text)])[_digest(text)].name == "crlf.jsonl"


def test_suites_are_read_before_anything_is_trained(tmp_path: Path) -> None:
    """By its own rules, whatever its metrics; one that is not there stops it, one without a score of the version is named."""
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "contains": ["x"]},
            {"messages": [{"role": "user", "content": "s"}], "completion": "b"}]  # fmt: skip
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    digest = _digest(file.read_text())
    mixed = {"suite": "mixed.jsonl", "suite_digest": digest, "results": {"x@v1": {"accuracy": {"value": 0.75}}}}
    loose = {"suite": "loose.jsonl", "suite_digest": "sha256:0", "results": {"base": {"accuracy": {"value": 1.0}}}}
    (suite,), left_out = stored_suites("x@v1", [mixed, loose], {digest: file})
    assert (suite.old, len(suite.suite.cases), suite.max_tokens) == (0.75, 3, 64)
    assert left_out == ["loose.jsonl: its record has no score of x@v1"]
    with pytest.raises(InvalidRecipe, match=r"mixed\.jsonl .* is not in the folders"):
        stored_suites("x@v1", [mixed], {})


def _digest(text: str) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_a_score_that_was_rounded_is_not_missed_by_the_rounding() -> None:
    """A record says 0.9667 of 29 right answers of 30; as many again are as good, one less is not."""
    assert Verdict("suite", old=0.9667, new=29 / 30, rows=30).good
    assert not Verdict("suite", old=0.9667, new=28 / 30, rows=30).good
