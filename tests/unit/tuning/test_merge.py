"""Merging: the merged model answers as base and adapter do, and a merge that would lose the adapter is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from engine.errors import InvalidAdapter, MergeRefused, NoSpace
from engine.registry.fingerprint import read_base
from engine.tuning import merge_check
from engine.tuning.deltas import Deltas
from engine.tuning.merge import check_target, four_bits, onto_base, onto_dequantized, write_merged
from engine.tuning.merge_check import Likeness, check_likeness, erasure, in_memory
from engine.tuning.merging import Merging, Scoring
from engine.tuning.suite import read_suite
from tests.unit.cli.calls import call
from tests.unit.tuning.tiny import write_base, write_rows

pytestmark = pytest.mark.slow

TEXT = torch.tensor([list(b"what is merged stays")])


def write_adapter(folder: Path, base: Path, seed: int = 0, size: float = 0.3, **settings: Any) -> Path:
    """A random adapter of the base."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=size)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
    return folder


def merging(adapter: Path, base: Path, precision: str = "full", scoring: Scoring | None = None) -> Merging:
    """A merge that reports to nobody."""
    return Merging(adapter, precision, base, scoring, lambda *_: None)


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[tuple[str, str]]:
    """Rows of a suite on which a model is always right: its own greedy answers; those that are blank are left out."""
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=256)[
            0, ids.shape[1] :
        ]
        found.append((prompt, tokenizer.decode(made, skip_special_tokens=True)))
    return [(prompt, answer) for prompt, answer in found if answer.strip()]


def logits(folder: Path) -> torch.Tensor:
    """What a model says to the text."""
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(TEXT).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        {"alpha_pattern": {"down_proj": 32}},
    ],
    ids=["plain", "rslora", "rank-pattern", "alpha-pattern"],
)
def test_a_merged_model_answers_as_base_and_adapter(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """In float32 to the last digits, whatever scales the adapter; and it is a base of its own, with tokenizer and card."""
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    work = merging(adapter, base)
    facts = work.write(tmp_path / "out", "base", "float32", check=True)
    work.card(tmp_path / "out", "support@v2", "sha256:d", "sha256:f", {"onto": "base", **facts})
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))(TEXT).logits
    assert torch.allclose(logits(tmp_path / "out"), wanted, atol=1e-4)
    assert not torch.allclose(logits(base), wanted, atol=1e-2)
    assert read_base(tmp_path / "out").fingerprint != read_base(base).fingerprint
    assert "support@v2" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_in_shards_is_merged_shard_by_shard(tmp_path: Path, base: Path) -> None:
    """The same names in the same files, with their index."""
    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="10KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((base / name).read_bytes())
    adapter = write_adapter(tmp_path / "adapter", base)
    seen: list[str] = []
    deltas = Deltas.read(adapter)
    write_merged(sharded, deltas, onto_base(deltas), None, tmp_path / "out", "auto", seen.append)
    write_merged(base, deltas, onto_base(deltas), None, tmp_path / "whole", "auto", lambda _: None)
    assert len(seen) > 2
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "whole"))


def test_rounding_to_sixteen_bits_is_within_its_tolerance_and_noise_is_not(tmp_path: Path, base: Path) -> None:
    """The comparison passes what rounding explains; it refuses what it does not."""
    adapter = write_adapter(tmp_path / "adapter", base, size=0.05)
    facts = merging(adapter, base).write(tmp_path / "out", "base", "bfloat16", check=True)
    assert facts["dtype"] == "bfloat16"
    with pytest.raises(MergeRefused, match="does not answer as base and adapter do"):
        check_likeness(Likeness(9.0, 0.5, 0.67), "bfloat16")


def test_four_bits_erase_an_adapter(tmp_path: Path, base: Path) -> None:
    """A change that is a small part of a 4-bit step is rounded away: hardly anything of it survives."""
    adapter = write_adapter(tmp_path / "adapter", base, size=0.03)
    found = erasure(base, Deltas.read(adapter), "nf4-double")
    assert found.change < found.error / 5
    assert found.survives < 0.3
    lost = merging(adapter, base).demonstrate()
    assert lost["models"]["merged onto the 16-bit base"]["kl"] < 1e-5 < lost["models"]["merged into nf4-double"]["kl"]


def test_a_qlora_version_is_merged_onto_what_it_was_trained_on(tmp_path: Path, base: Path) -> None:
    """Both bases are compared; the dequantised one is exact, the original one is not."""
    adapter = write_adapter(tmp_path / "adapter", base, size=0.05)
    work = merging(adapter, base, "nf4-double")
    onto, choices = work.choose("auto", check=True)
    assert onto == "dequantized"
    assert choices["dequantized"]["kl"] < 1e-6 < choices["base"]["kl"]
    facts = work.write(tmp_path / "out", onto, "float32", check=True)
    assert facts["likeness"]["agreement"] == 1.0


@pytest.mark.parametrize("better", ["base", "dequantized"])
def test_a_suite_decides_what_a_qlora_version_is_merged_onto(
    tmp_path: Path, base: Path, tokenizer: Any, better: str
) -> None:
    """Before likeness does: what answers more of it rightly, whichever that is."""
    adapter = write_adapter(tmp_path / "adapter", base, size=0.05)
    deltas = Deltas.read(adapter)
    change = onto_base(deltas) if better == "base" else onto_dequantized(deltas, "nf4-double")
    others = None if better == "base" else lambda _, weight: four_bits(weight, "nf4-double")
    rows = answers(in_memory(base, deltas, change, others), tokenizer, [f"q{n}:" for n in range(8)], 6)
    suite = read_suite(write_rows(tmp_path / "suite.jsonl", rows))
    work = merging(adapter, base, "nf4-double", Scoring(suite, max_tokens=6))
    onto, choices = work.choose("auto", check=True)
    other = "dequantized" if better == "base" else "base"
    assert onto == better
    assert choices[better]["accuracy"] == 1.0 > choices[other]["accuracy"]
    assert choices["dequantized"]["kl"] < choices["base"]["kl"]


def test_a_named_target_without_a_check_loads_no_model(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose model does not fit into memory can still merge."""
    adapter = write_adapter(tmp_path / "adapter", base)

    def fail(*_: Any) -> None:
        raise AssertionError("a whole model was loaded")

    monkeypatch.setattr(merge_check, "load_base", fail)
    monkeypatch.setattr("engine.tuning.merging.load_base", fail)
    work = merging(adapter, base, "nf4-double")
    for onto in ("base", "dequantized"):
        assert work.choose(onto, check=False) == (onto, {})
        assert work.write(tmp_path / onto, onto, "auto", check=False) == {"dtype": "float32"}
    with pytest.raises(AssertionError, match="whole model"):
        work.choose("dequantized", check=True)


def test_nothing_is_dequantised_that_was_not_in_four_bits(tmp_path: Path, base: Path) -> None:
    """The answer was the base, in silence."""
    adapter = write_adapter(tmp_path / "adapter", base)
    with pytest.raises(MergeRefused, match="nothing to dequantise"):
        merging(adapter, base).choose("dequantized", check=False)


@pytest.mark.parametrize("target", ["dequantised", "bf16", "float32", ""])
def test_an_unknown_target_is_called_that(base: Path, target: str) -> None:
    """A slip of the pen erases no adapter."""
    with pytest.raises(MergeRefused, match="unknown target") as caught:
        check_target(base, target)
    assert "base, dequantized or auto" in caught.value.fix


def test_quantising_twice_changes_nothing() -> None:
    """A dequantised weight lies on the grid, which is why a small change to it rounds straight back."""
    torch.manual_seed(0)
    once = four_bits(torch.randn(64, 64), "nf4")
    assert torch.allclose(four_bits(once, "nf4"), once, atol=1e-6)
    assert torch.allclose(four_bits(once + 1e-4, "nf4"), once, atol=1e-3)


@pytest.mark.parametrize("target", ["nf4", "4bit", "int8"])
def test_a_four_bit_target_is_refused_with_the_reason(base: Path, target: str) -> None:
    """Before anything is computed."""
    with pytest.raises(MergeRefused, match="would erase the adapter") as caught:
        check_target(base, target)
    assert "then quantise the merged model" in caught.value.fix


def test_a_quantised_base_is_refused(tmp_path: Path, base: Path) -> None:
    """Its own configuration says so."""
    shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeRefused, match="is quantised"):
        check_target(tmp_path / "quantised", "auto")


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half model that somebody might serve; and a full disk is found before."""
    deltas = Deltas.read(write_adapter(tmp_path / "adapter", base))

    def fail(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_merged(base, deltas, onto_base(deltas), None, tmp_path / "out", "auto", fail)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))  # type: ignore[attr-defined]
    with pytest.raises(NoSpace):
        write_merged(base, deltas, onto_base(deltas), None, tmp_path / "out", "auto", lambda _: None)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    """By its layers, when nothing else says so."""
    deltas = Deltas.read(write_adapter(tmp_path / "adapter", base))
    other = Deltas(deltas.folder, deltas.config, deltas.modules | {"model.layers.9.mlp.up_proj"})
    with pytest.raises(MergeRefused, match="no layer"):
        write_merged(base, other, onto_base(other), None, tmp_path / "out", "auto", lambda _: None)


def test_the_command_merges_a_published_version(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    """Out of a registry, scored on a suite; the version's base is checked first."""
    adapter = write_adapter(tmp_path / "adapter", base)
    where = ("--registry", tmp_path / "registry", "--model", base)
    assert call("adapters", "publish", adapter, "tiny", *where).code == 0
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    rows = answers(model, tokenizer, [f"q{n}:" for n in range(8)], 3)[:3]
    suite = write_rows(tmp_path / "suite.jsonl", [*rows, ("q9:", " no, never")])
    words = ("merge", "tiny", "--suite", suite, "--dtype", "float32", *where, "--json", "--out")
    found = call(*words, tmp_path / "out", "--max-tokens", "3").json
    assert found["accuracy"] == found["accuracy_unmerged"] == 0.75
    assert call(*words, tmp_path / "longer").json["accuracy"] < 0.75
    assert call("merge", "tiny", "--out", tmp_path / "out", *where).code == 2  # the folder exists
    refused = call("merge", "tiny", "--out", tmp_path / "other", "--onto", "nf4", *where)
    assert (refused.code, "would erase" in refused.err) == (1, True)
    both = call("merge", "tiny@v1", adapter, "--method", "cat", "--out", tmp_path / "both", *where)
    assert both.code == 0
    assert call("adapters", "publish", tmp_path / "both", "both", *where).code == 0
    record = json.loads((tmp_path / "both" / "run.json").read_text())
    assert [parent["ref"] for parent in record["combined"]["parents"]] == ["tiny@v1", str(adapter)]
    assert record["base"]["fingerprint"] == read_base(base).fingerprint


def test_a_version_is_merged_into_the_base_beside_which_it_was_published(tmp_path: Path, base: Path) -> None:
    """Also where nothing records on which one it was trained: it is served on that base alone. A folder says nothing."""
    other = write_base(tmp_path / "other", seed=5)
    adapter = write_adapter(tmp_path / "adapter", base)
    where = ("--registry", tmp_path / "registry")
    assert call("adapters", "publish", adapter, "tiny", *where, "--model", base).code == 0
    for words in (("tiny@v1",), ("tiny@v1", adapter, "--method", "cat")):
        refused = call("merge", *words, "--out", tmp_path / "out", "--model", other, *where)
        assert (refused.code, "was trained on base" in refused.err, (tmp_path / "out").exists()) == (1, True, False)
        assert (
            "nothing records which base"
            in call("merge", *words, "--out", tmp_path / "out", "--model", base, *where).out
        )
        shutil.rmtree(tmp_path / "out")
    shown = call("merge", adapter, "--out", tmp_path / "out", "--model", base, "--json").json
    assert shown["warnings"] == [f"nothing records which base {adapter} was trained on: tiny was assumed"]
    assert shown["warnings"][0] in (tmp_path / "out" / "README.md").read_text()
    (adapter / "run.json").write_text(json.dumps({"base": {"fingerprint": read_base(base).fingerprint}}))
    assert call("merge", adapter, "--out", tmp_path / "told", "--model", base, "--json").json["warnings"] == []


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        ('{"base": "meta-llama/Llama-3.2-1B"}', 0, "nothing records which base"),
        ('{"base": {"fingerprint": ["?"]}, "recipe": "lora"}', 0, "nothing records which base"),
        ("[1]", 0, "nothing records which base"),
        ('{"base": {"precision": "bf16"}}', 1, "'bf16' is none of full"),
    ],
)
def test_the_record_of_another_tool_is_no_accident(tmp_path: Path, base: Path, run: str, code: int, said: str) -> None:
    """It says nothing where it has another shape; a precision that is not known cannot be chosen for."""
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "run.json").write_text(run)
    for words in ((), (write_adapter(tmp_path / "plain", base), "--method", "cat")):
        out = tmp_path / f"out{len(words)}"
        shown = call("merge", adapter, *words, "--model", base, "--no-check", "--out", out)
        assert (shown.code, said in shown.out + shown.err) == (code, True)
        assert out.exists() == (code == 0)


def test_a_suite_is_asked_as_the_command_says(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    """Up to a stop text, as `loraplex eval` asks it."""
    adapter = write_adapter(tmp_path / "adapter", base)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    told = answers(model, tokenizer, [f"q{n}:" for n in range(8)], 8)
    prompt, answer, stop = next(
        (prompt, answer[:at], answer[at]) for prompt, answer in told for at in range(1, len(answer))
        if answer[:at].strip() and answer[at].isprintable() and answer[at] not in answer[:at]
    )  # fmt: skip
    suite = write_rows(tmp_path / "suite.jsonl", [(prompt, answer)])
    words = ("merge", adapter, "--model", base, "--suite", suite, "--dtype", "float32", "--json", "--out")
    assert call(*words, tmp_path / "out", "--stop", stop).json["accuracy"] == 1.0
    assert call(*words, tmp_path / "other").json["accuracy"] == 0.0


def test_a_damaged_configuration_is_refused(tmp_path: Path, base: Path) -> None:
    """DoRA is more than a sum."""
    adapter = write_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidAdapter, match="DoRA"):
        Deltas.read(adapter)


def test_versions_are_compared_layer_by_layer(tmp_path: Path, base: Path) -> None:
    """By what they change, not by their factors: an adapter and its negative have cosine -1 and twice the norm between them."""
    first = write_adapter(tmp_path / "first", base)
    second = write_adapter(tmp_path / "second", base)
    weights = load_file(second / "adapter_model.safetensors")
    turned = {
        name: -tensor if ".layers.1." in name and "lora_B" in name else tensor for name, tensor in weights.items()
    }
    save_file(turned, second / "adapter_model.safetensors")
    where = ("--registry", tmp_path / "registry", "--model", base)
    for folder in (first, second):
        assert call("adapters", "publish", folder, "tiny", *where).code == 0
    shown = call("adapters", "diff", "tiny@v1", "tiny@v2", *where[:2], "--json").json
    same, opposite = shown["layers"]
    assert (same["layer"], same["difference"], round(same["cosine"], 4)) == ("layer 0", pytest.approx(0, abs=1e-2), 1.0)
    assert round(opposite["cosine"], 4) == -1.0
    assert opposite["difference"] == pytest.approx(2 * opposite["a"], rel=1e-3)


def test_versions_of_different_bases_are_not_compared_layer_by_layer(tmp_path: Path, base: Path) -> None:
    """They change other weights, which may be of another size; the rest is compared, and it is said."""
    registry = ("--registry", tmp_path / "registry")
    for model in (base, write_base(tmp_path / "wide", hidden_size=32)):
        folder = write_adapter(tmp_path / f"of-{model.name}", model)
        assert call("adapters", "publish", folder, "tiny", *registry, "--model", model).code == 0
    shown = call("adapters", "diff", "tiny@v1", "tiny@v2", *registry)
    assert (shown.code, "not compared layer by layer: they are of different bases" in shown.out) == (0, True)
    data = call("adapters", "diff", "tiny@v1", "tiny@v2", *registry, "--json").json
    assert ("layers" in data, "base" in data["different"]) == (False, True)
