"""`loraplex train`, called as a user calls it; only the process that trains is replaced where a test needs no training."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.client.testing import fake_server
from engine.errors import TrainingFailed
from engine.registry.fingerprint import read_base
from engine.tuning import training
from engine.tuning.recipe import load_recipe
from engine.tuning.run_folder import RunFolder
from tests.unit.cli.calls import call
from tests.unit.tuning.tiny import write_base


def result(folder: RunFolder, exact: float = 0.9) -> dict[str, Any]:
    """What a process would have said."""
    recipe = folder.recipe()
    evaluation = {"metric": "exact match", "rows": 8, "adapter": exact, "interval": [0.5, 1.0], "base": 0.0,
                  "base_begins_right": 0.1, "loss": 1 - exact, "precision": "full"}  # fmt: skip
    run = {"recipe": {"name": recipe.name}, "steps": 8, "seconds": 1.0, "final_loss": 0.5, "tokens_per_second": 100,
           "peak_bytes": 10**9, "evaluation": evaluation, "advice": ["try more"]}  # fmt: skip
    return {"run": run, "advice": ["try more"], "notes": ["it is padded"], "adapter": str(folder.adapter)}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunFolder]:
    """The runs that were started; each is told to have been finished, better with a higher rank."""
    folders: list[RunFolder] = []

    def run(folder: RunFolder, on_event: training.OnEvent) -> dict[str, Any]:
        folders.append(folder)
        on_event({"event": "stage", "text": "training"})
        on_event({"event": "step", "step": 8, "steps": 8, "loss": 0.5, "tokens_per_second": 10.0, "bytes": 10**9})
        return result(folder, folder.recipe().lora.rank / 16)

    monkeypatch.setattr(training, "run", run)
    return folders


def test_init_writes_a_recipe_once(tmp_path: Path) -> None:
    """A second time nothing is overwritten."""
    file = tmp_path / "new.yaml"
    assert call("train", file, "--init").code == 0
    file.write_text("mine")
    assert call("train", file, "--init").code == 2
    assert file.read_text() == "mine"


def test_a_dry_run_shows_what_is_learnt_and_trains_nothing(recipe_file: Path, trained: list[RunFolder]) -> None:
    """Trainable share, memory, lengths, and samples with the labelled part marked."""
    shown = call("train", recipe_file, "--dry-run")
    assert shown.code == 0
    assert "q0:[[ yes</s>]]" in shown.out
    assert "parameters of" in shown.out
    assert "about" in shown.out
    assert trained == []
    assert call("train", recipe_file, "--dry-run", "--json").json["rows"] == 32
    shown = call("train", recipe_file, "--dry-run", "--set", "batch_size=20", "--set", "steps=4")
    assert "4 of 20 rows: 2.0 times through the data" in shown.out


def test_the_base_is_that_of_the_recipe_and_is_named(
    recipe_file: Path, base: Path, trained: list[RunFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the server's variable says; only --model gives another one."""
    monkeypatch.setenv("LORAPLEX_MODEL", str(tmp_path / "the server's"))
    named = f"tiny {read_base(base).fingerprint[:19]}"
    assert f"base         {named}" in call("train", recipe_file, "--dry-run").out
    assert call("train", recipe_file, "--dry-run", "--json").json["base"]["fingerprint"] == read_base(base).fingerprint
    shown = call("train", recipe_file, "--runs", tmp_path / "runs")
    assert f"base {named}; 32 rows" in shown.err
    other = write_base(tmp_path / "other", seed=3)
    assert "base         other sha256:" in call("train", recipe_file, "--dry-run", "--model", other).out
    assert [folder.recipe().base for folder in trained] == [str(base)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "rnak=3"), "unknown key; did you mean"),
        (("--set", "targets=[qq]"), "down_proj, gate_proj"),
        (("--set", "rank=99"), "above the engine's limit"),
        (("--set", "data.train=absent.jsonl"), "cannot read"),
        (("--set", "max_length=8", "--set", "data.train=heldout.jsonl"), "also row"),
        (("--set", "base=nowhere"), "no base model"),
        (("--sweep", "rank=4,99"), "above the engine's limit"),
        (("--sweep", "max_length=64,8", "--set", "data.train=heldout.jsonl"), "also row"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    recipe_file: Path, trained: list[RunFolder], words: tuple[str, ...], said: str
) -> None:
    """Recipe, base and rows: exit code 1, and what to do."""
    shown = call("train", recipe_file, *words)
    assert shown.code == 1
    assert said in shown.err
    assert trained == []


def test_a_run_tells_its_score_and_its_advice(recipe_file: Path, trained: list[RunFolder], tmp_path: Path) -> None:
    """And how to publish it."""
    shown = call("train", recipe_file, "--runs", tmp_path / "runs")
    assert shown.code == 0
    assert "25% right of 8 (50% to 100%)" in shown.out
    assert "warning: try more" in shown.out
    assert "loraplex adapters publish" in shown.out
    assert "step 8/8" in shown.err
    assert trained[0].path.parent == tmp_path / "runs"


def test_where_to_publish_is_tried_before_anything_is_trained(recipe_file: Path, trained: list[RunFolder]) -> None:
    """A server that is not there, a name that cannot be."""
    assert call("train", recipe_file, "--publish", "x", "--server", "127.0.0.1:9").code == 1
    assert call("train", recipe_file, "--publish", "No Name", "--server", "127.0.0.1:9").code == 1
    assert trained == []


def test_a_key_that_cannot_sign_is_found_before_anything_is_trained(
    recipe_file: Path, trained: list[RunFolder], tmp_path: Path
) -> None:
    """A public key, a file that is none, and a key without a publication."""
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for name, content in (("rsa.pem", pem), ("none.pem", b"no key")):
        (tmp_path / name).write_bytes(content)
        shown = call("train", recipe_file, "--publish", "x", "--registry", tmp_path / "r", "--sign", tmp_path / name)
        assert (shown.code, f"the key {name} cannot sign" in shown.err) == (1, True)
    assert call("train", recipe_file, "--sign", tmp_path / "rsa.pem").code == 2
    assert trained == []


def test_what_the_server_would_refuse_is_said_before_anything_is_trained(
    recipe_file: Path, trained: list[RunFolder]
) -> None:
    """Its base, and its highest rank."""
    base = load_recipe(recipe_file).base
    with fake_server() as other, fake_server(model=base, max_rank=8) as server:
        shown = call("train", recipe_file, "--publish", "x", "--server", other.target)
        assert (shown.code, "this engine serves base" in shown.err) == (1, True)
        shown = call("train", recipe_file, "--set", "rank=16", "--publish", "x", "--server", server.target)
        assert (shown.code, "above the 8 that" in shown.err) == (1, True)
    assert trained == []


def test_a_score_is_told_though_publishing_fails(recipe_file: Path, trained: list[RunFolder], tmp_path: Path) -> None:
    """And where the adapter is; here the run left none that could be published."""
    with fake_server(model=load_recipe(recipe_file).base) as server:
        shown = call("train", recipe_file, "--runs", tmp_path / "runs", "--publish", "x", "--server", server.target)
    assert shown.code == 1
    assert "25% right of 8" in shown.out
    assert len(trained) == 1


@pytest.mark.parametrize(
    "words", [("--dry-run",), ("--set", "rank=2"), ("--model", "elsewhere"), ("--sweep", "rank=2,4")]
)
def test_a_resumed_run_keeps_to_its_recipe(
    recipe_file: Path, trained: list[RunFolder], tmp_path: Path, words: tuple[str, ...]
) -> None:
    """What it cannot heed is refused by its name, instead of trained without."""
    folder = RunFolder.create(tmp_path / "runs", load_recipe(recipe_file), {})
    shown = call("train", "--resume", folder.path, *words)
    assert (shown.code, f"leave out {words[0]}" in shown.err) == (2, True)
    assert trained == []


@pytest.mark.parametrize("words", [("--dry-run",), ("--out", "copy")])
def test_a_sweep_refuses_what_it_would_not_heed(
    recipe_file: Path, trained: list[RunFolder], words: tuple[str, ...]
) -> None:
    """It trains, and it copies nothing."""
    shown = call("train", recipe_file, "--sweep", "rank=2,4", *words)
    assert (shown.code, f"leave out {words[0]}" in shown.err) == (2, True)
    assert trained == []


def test_a_folder_that_holds_no_adapter_is_refused_before_anything_is_trained(
    recipe_file: Path, trained: list[RunFolder], tmp_path: Path
) -> None:
    """Neither replaced, nor found out after hours."""
    (tmp_path / "mine").mkdir()
    shown = call("train", recipe_file, "--out", tmp_path / "mine")
    assert (shown.code, "is no adapter's folder" in shown.err) == (2, True)
    assert trained == []


def test_a_score_is_told_though_the_copy_fails(recipe_file: Path, trained: list[RunFolder], tmp_path: Path) -> None:
    """Here a file lies where a folder must be."""
    (tmp_path / "file").write_text("")
    shown = call("train", recipe_file, "--runs", tmp_path / "runs", "--out", tmp_path / "file" / "copy")
    assert shown.code == 1
    assert "25% right of 8" in shown.out
    assert len(trained) == 1


def test_a_sweep_compares_its_runs(recipe_file: Path, trained: list[RunFolder], tmp_path: Path) -> None:
    """One run for each value."""
    shown = call("train", recipe_file, "--runs", tmp_path / "runs", "--sweep", "rank=2,8", "--json")
    assert [(run["value"], run["evaluation"]["adapter"]) for run in shown.json["runs"]] == [(2, 0.125), (8, 0.5)]
    assert [folder.recipe().lora.rank for folder in trained] == [2, 8]
    shown = call("train", recipe_file, "--runs", tmp_path / "runs", "--sweep", "rank=2,8").out
    assert all(
        f"warning: lora.rank = {rank}: {said}" in shown for rank in (2, 8) for said in ("try more", "it is padded")
    )


def test_a_run_is_trained_by_one_process_at_a_time(recipe_file: Path, tmp_path: Path) -> None:
    """Else both would write its metrics and checkpoints."""
    folder = RunFolder.create(tmp_path / "runs", load_recipe(recipe_file), {})
    with folder.locked():
        shown = call("train", "--resume", folder.path)
    assert (shown.code, "another process is training this run" in shown.err) == (1, True)
    assert not (folder.path / "metrics.jsonl").exists()


def test_a_run_whose_checkpoints_do_not_fit_is_refused_before_it_is_trained(
    recipe_file: Path, trained: list[RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its own checkpoints take."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    shown = call("train", recipe_file, "--runs", tmp_path / "runs")
    assert (shown.code, "checkpoints takes about" in shown.err) == (1, True)
    assert trained == []


def test_files_of_the_working_folder_are_no_modules_of_the_training_process(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue.py of the user's is neither run nor in the way; the process gets as far as the run, which is taken here."""
    from engine.tuning.recipe import load_recipe

    folder = RunFolder.create(tmp_path / "runs", load_recipe(recipe_file), {})
    for name in ("queue.py", "logging.py", "yaml.py", "pydantic.py"):
        (tmp_path / name).write_text("raise SystemExit('my own')")
    monkeypatch.chdir(tmp_path)
    with folder.locked(), pytest.raises(TrainingFailed, match="another process is training this run"):
        training.run(folder, lambda _: None)


def test_a_killed_process_is_told_with_how_to_go_on(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most likely memory; the run can be resumed."""
    import sys

    from engine.tuning.recipe import load_recipe

    folder = RunFolder.create(tmp_path / "runs", load_recipe(recipe_file), {})
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nkill -9 $$\n")
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(TrainingFailed, match="lack of memory") as caught:
        training.run(folder, lambda _: None)
    assert f"--resume {folder.path}" in caught.value.fix
