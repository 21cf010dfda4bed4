"""Adapters from elsewhere: converted when the result computes the same, refused by name when nothing plain does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from engine.commands.fetched import fetched
from engine.errors import InvalidAdapter
from engine.registry.config_checks import read_config
from engine.tuning.conversion import import_adapter
from engine.tuning.recipe import PRECISIONS, parse_recipe
from tests.unit.cli.calls import call
from tests.unit.tuning import hub
from tests.unit.tuning.test_merge import TEXT, write_adapter

pytestmark = pytest.mark.slow


def answers(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base and adapter, as PEFT computes them."""
    with torch.no_grad():
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))(TEXT).logits


def configure(adapter: Path, **fields: Any) -> None:
    """Change fields of an adapter's configuration."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | fields))


def trained(base: Path, folder: Path, *, train: str, **settings: Any) -> tuple[Path, torch.Tensor, Path]:
    """An adapter with some of its parameters changed, as by training; its logits; and the folder as it began."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(folder / "initial"), save_embedding_layers=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if train in name:
                parameter += 0.1 * torch.randn_like(parameter)
        wanted = model(TEXT).logits
    model.save_pretrained(str(folder / "trained"), save_embedding_layers=False)
    return folder / "trained", wanted, folder / "initial"


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_becomes_plain_lora_of_twice_the_rank(tmp_path: Path, base: Path, rslora: bool) -> None:
    """The same logits on the untouched base, from the base's own singular values or from the initial adapter."""
    adapter, wanted, initial = trained(base, tmp_path, train="lora_", init_lora_weights="pissa", use_rslora=rslora)
    for target, help_ in (("a", {"base": base}), ("b", {"initial": initial})):
        done = import_adapter(adapter, tmp_path / target, **help_).done
        assert done == ("pissa, as plain LoRA of twice the rank",)
        assert json.loads((tmp_path / target / "adapter_config.json").read_text())["r"] == 8
        assert torch.allclose(answers(base, tmp_path / target), wanted, atol=1e-3)
    with pytest.raises(InvalidAdapter, match="only be judged beside the base"):
        import_adapter(adapter, tmp_path / "c")


def test_olora_needs_the_adapter_as_it_began(tmp_path: Path, base: Path) -> None:
    """With it, the same logits; without it, refused by name."""
    adapter, wanted, initial = trained(base, tmp_path, train="lora_", init_lora_weights="olora")
    import_adapter(adapter, tmp_path / "a", initial=initial)
    assert torch.allclose(answers(base, tmp_path / "a"), wanted, atol=1e-3)
    with pytest.raises(InvalidAdapter, match="olora cannot be converted without"):
        import_adapter(adapter, tmp_path / "b", base=base)


@pytest.mark.parametrize("kind", ["eva", "mica"])
def test_what_begins_with_zeros_is_plain_lora(tmp_path: Path, base: Path, kind: str) -> None:
    """EVA has directions of the data in A and zeros in B, MiCA directions of the weight in B and zeros in A."""
    adapter, wanted, _ = trained(base, tmp_path, train="lora_", init_lora_weights="gaussian")
    configure(adapter, init_lora_weights=kind)
    assert import_adapter(adapter, tmp_path / "a").done == (f"{kind}, as the plain LoRA that it is",)
    assert torch.allclose(answers(base, tmp_path / "a"), wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ["loftq", "pissa_or_so", "mystery"])
def test_what_trains_on_another_base_is_refused_by_name(tmp_path: Path, base: Path, kind: str) -> None:
    """LoftQ's base is quantised, so taking its beginning out of W makes another model; and who knows of the unknown ones."""
    adapter, _, initial = trained(base, tmp_path, train="lora_", init_lora_weights="gaussian")
    configure(adapter, init_lora_weights=kind)
    for help_ in ({"base": base}, {"initial": initial}):
        with pytest.raises(InvalidAdapter, match=f"'{kind}' is none of the kinds") as caught:
            import_adapter(adapter, tmp_path / "a", **help_)
        assert "--initial" not in caught.value.fix
    with pytest.raises(InvalidAdapter) as caught:
        read_config(adapter, 16)
    assert "weight_conversion" not in caught.value.fix


def test_dora_is_converted_only_where_it_is_plain(tmp_path: Path, base: Path) -> None:
    """Lengths as they were: yes. Learnt ones: no plain LoRA computes that, and it is said which layer shows it."""
    adapter, _, _ = trained(base, tmp_path, train="magnitude", use_dora=True)
    with pytest.raises(InvalidAdapter, match="DoRA has learnt other lengths"):
        import_adapter(adapter, tmp_path / "a", base=base)
    plain, wanted, _ = trained(base, tmp_path / "same", train="nothing", use_dora=True)
    import_adapter(plain, tmp_path / "b", base=base)
    assert torch.allclose(answers(base, tmp_path / "b"), wanted, atol=1e-3)


def test_a_trainers_folder_is_imported_without_what_else_it_holds(tmp_path: Path, base: Path) -> None:
    """Wrapped names, optimizer states, a tokenizer, the path of somebody's machine: then it can be published."""
    folder = write_adapter(tmp_path / "theirs", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = answers(base, folder)
    wrapped = {name.replace("lora_A.", "lora_A.default.").replace("model.layers", "model._orig_mod.layers"): tensor
               for name, tensor in tensors.items()}  # fmt: skip
    save_file(wrapped, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "tokenizer.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    found = call("adapters", "import", folder, "--out", tmp_path / "ready", "--model", base, "--json").json
    assert set(found["left_out"]) == {"optimizer.pt", "tokenizer.json", "trainer_state.json"}
    assert torch.allclose(answers(base, tmp_path / "ready"), wanted)
    published = call("adapters", "publish", tmp_path / "ready", "x", "--registry", tmp_path / "r", "--model", base)
    assert published.code == 0


@pytest.mark.parametrize(("file", "said"), [("adapter_model.bin", "pickle file"), ("other", "the file is missing")])
def test_what_is_no_adapter_is_refused(tmp_path: Path, file: str, said: str) -> None:
    """A pickle is never opened."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    (tmp_path / "theirs" / file).write_bytes(b"x")
    shown = call("adapters", "import", tmp_path / "theirs", "--out", tmp_path / "ready")
    assert (shown.code, said in shown.err, (tmp_path / "ready").exists()) == (1, True, False)


def test_a_version_goes_out_and_comes_back(tmp_path: Path, base: Path) -> None:
    """Through a folder and an object store; PEFT loads it, and nothing is overwritten."""
    adapter = write_adapter(tmp_path / "adapter", base)
    where = ("--registry", tmp_path / "registry")
    call("adapters", "publish", adapter, "tiny", *where, "--model", base)
    bucket = f"file://{tmp_path}/bucket"
    for target in (str(tmp_path / "out"), bucket):
        assert call("adapters", "export", "tiny@v1", target, *where).code == 0
        assert call("adapters", "export", "tiny@v1", target, *where).code in (1, 2)
    assert call("adapters", "import", bucket, "--out", tmp_path / "back", "--model", base).code == 0
    assert torch.equal(answers(base, tmp_path / "out"), answers(base, tmp_path / "back"))


def beside(there: hub.Hub, home: Path, *words: object) -> str:
    """What loraplex says, in a process of its own: the Hub's client reads where the Hub is when it is imported."""
    command = [str(Path(sys.executable).parent / "loraplex"), *map(str, words)]
    hub_is = {"HF_ENDPOINT": there.url, "HF_TOKEN": "hf_x", "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=os.environ | hub_is, capture_output=True, text=True, check=False)
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_a_version_goes_to_the_hub_and_comes_back(tmp_path: Path, base: Path) -> None:
    """By the Hub's own client: a commit and a tag of the version's files, unchanged, and again for the next version."""
    where = ("--registry", tmp_path / "registry")
    for seed in (1, 2):
        adapter = write_adapter(tmp_path / f"adapter{seed}", base, seed=seed)
        assert call("adapters", "publish", adapter, "tiny", *where, "--model", base).code == 0
    with hub.serving() as there:
        loraplex = partial(beside, there, tmp_path)
        for version in ("v1", "v2"):
            assert loraplex("adapters", "export", f"tiny@{version}", "hf://me/tiny", *where).startswith("0 ")
        assert there.private == {"me/tiny": True}
        assert there.messages == ["loraplex: tiny@v1", "loraplex: tiny@v2"]
        for revision, of, out in (("", 2, "newest"), ("@v1", 1, "first")):
            target = tmp_path / out
            assert loraplex("adapters", "import", f"hf://me/tiny{revision}", "--out", target).startswith("0 ")
            sent, came = (folder / "adapter_model.safetensors" for folder in (tmp_path / f"adapter{of}", target))
            assert came.read_bytes() == sent.read_bytes()
        refused = loraplex("adapters", "export", "tiny@v1", "hf://others/tiny", *where)
        assert refused.startswith("1 ")
        assert "you may not write to others" in refused
        assert "may write to" in refused.partition("fix:")[2]
        missing = loraplex("adapters", "import", "hf://me/nothing", "--out", tmp_path / "nothing")
        assert missing.startswith("1 ")
        assert "Traceback" not in missing


def test_the_hub_holds_what_the_version_holds(tmp_path: Path, base: Path) -> None:
    """No file of the version before but the model card; no tag at another's files; nothing private for all to read."""
    where = ("--registry", tmp_path / "registry")
    for name, version, files in (
        ("tiny", "v1", ("README.md", "model.sig.json")),
        ("tiny", "v2", ()),
        ("other", "v1", ()),
    ):
        adapter = write_adapter(tmp_path / f"{name}-{version}", base, seed=len(name + version + str(files)))
        for file in files:
            (adapter / file).write_text("{}")
        assert call("adapters", "publish", adapter, name, *where, "--version", version, "--model", base).code == 0
    with hub.serving() as there:
        loraplex = partial(beside, there, tmp_path)
        for version in ("v1", "v2"):
            assert loraplex("adapters", "export", f"tiny@{version}", "hf://me/tiny", *where).startswith("0 ")
        revisions = there.repositories["me/tiny"]
        plain = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert set(revisions["v1"]) == {*plain, "model.sig.json"}
        assert set(revisions["v2"]) == set(revisions["main"]) == plain
        before = dict(revisions["main"])
        refused = loraplex("adapters", "export", "other@v1", "hf://me/tiny", *where)
        assert (refused[:2], "has a tag v1" in refused, revisions["main"]) == ("1 ", True, before)
        there.private["me/tiny"] = False
        refused = loraplex("adapters", "export", "tiny@v2", "hf://me/tiny", *where)
        assert (refused[:2], "is public" in refused, "--no-private" in refused) == ("1 ", True, True)
        assert revisions["main"] == before
        assert loraplex("adapters", "export", "tiny@v2", "hf://me/tiny", "--no-private", *where).startswith("0 ")


def test_a_pickle_on_the_hub_is_called_that(tmp_path: Path) -> None:
    """As one in a folder or a bucket is; it is not even fetched."""
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}
    (tmp_path / "bucket").mkdir()
    for name, data in files.items():
        (tmp_path / "bucket" / name).write_bytes(data)
    bucket = call("adapters", "import", f"file://{tmp_path}/bucket", "--out", tmp_path / "out")
    assert (bucket.code, "only a pickle file" in bucket.err) == (1, True)
    with hub.serving() as there:
        there.repositories["me/pickle"], there.private["me/pickle"] = {"main": files}, False
        shown = beside(there, tmp_path, "adapters", "import", "hf://me/pickle", "--out", tmp_path / "out")
    assert (shown[:2], "only a pickle file" in shown, "safe_serialization" in shown) == ("1 ", True, True)


def test_how_the_base_was_held_is_noted_in_the_runs_record(tmp_path: Path, base: Path) -> None:
    """Other trainers do not say it, and without it a QLoRA adapter is taken for one of the full base; what is there stays."""
    adapter = write_adapter(tmp_path / "adapter", base)
    words = ("adapters", "import", adapter, "--out", tmp_path / "ready", "--precision")
    assert call(*words, "int3").code == 2
    assert call(*words, "nf4-double").code == 0
    with fetched([str(tmp_path / "ready")], None) as (version,):
        assert version.precision == "nf4-double"
    (tmp_path / "ready" / "run.json").write_text(
        json.dumps({"run_id": "r", "base": {"name": "b", "precision": "full"}})
    )
    import_adapter(tmp_path / "ready", tmp_path / "again", precision="fp4")
    found = json.loads((tmp_path / "again" / "run.json").read_text())
    assert found == {"run_id": "r", "base": {"name": "b", "precision": "fp4"}}
    published = call("adapters", "publish", tmp_path / "ready", "x", "--registry", tmp_path / "r", "--model", base)
    assert published.code == 0


def test_the_precisions_are_those_of_a_recipe(tmp_path: Path) -> None:
    """An imported adapter may have been trained as one of ours was, and merges as that."""
    content = {"name": "x", "base": "b", "method": "qlora", "data": {"train": "t", "held_out": "h"}}
    own = {
        parse_recipe({**content, "quantization": {"type": kind, "double": double}}).precision_name
        for kind in ("nf4", "fp4") for double in (True, False)
    }  # fmt: skip
    assert set(PRECISIONS) == {"full", *own}


@pytest.mark.parametrize(
    ("config", "weights", "said", "fix"),
    [
        ("[1]", None, "the file is not a JSON object", "Write adapter_config.json again"),
        ("{", None, "the file is not JSON", "Write adapter_config.json again"),
        (None, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git-lfs", "git lfs pull"),
        (None, b"nonsense", "it is damaged", "Copy the adapter again"),
        (
            '{"r": 4, "init_lora_weights": "pissa"}',
            None,
            "lora_alpha: it is missing",
            "Write adapter_config.json again",
        ),
        ('{"r": 0, "lora_alpha": 8, "init_lora_weights": "pissa"}', None, "r: it is missing", "Write"),
    ],
    ids=["list", "no-json", "lfs-pointer", "damaged", "no-alpha", "no-rank"],
)
def test_a_damaged_folder_is_refused_by_name(
    tmp_path: Path, base: Path, config: str | None, weights: bytes | None, said: str, fix: str
) -> None:
    """With what to do about it."""
    adapter = write_adapter(tmp_path / "adapter", base)
    if config is not None:
        (adapter / "adapter_config.json").write_text(config)
    if weights is not None:
        (adapter / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(InvalidAdapter, match=said) as caught:
        import_adapter(adapter, tmp_path / "ready", base)
    assert fix in caught.value.fix


@pytest.mark.parametrize("words", [("import", "hf://a/b/c", "--out", "ready"), ("export", "tiny", "hf://a/b/c")])
def test_what_is_no_repository_of_the_hub_is_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """By the Hub's own client, before it calls anybody."""
    monkeypatch.chdir(tmp_path)
    where = ("--registry", tmp_path / "registry")
    call("adapters", "publish", write_adapter(tmp_path / "adapter", base), "tiny", *where, "--model", base)
    shown = call("adapters", *words, *(where if words[0] == "export" else ()))
    assert (shown.code, "Repo id must be" in shown.err, "OWNER/NAME" in shown.err) == (1, True, True)
