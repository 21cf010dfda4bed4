"""Every adapter that vLLM would load wrongly is refused, naming where it is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InvalidAdapter, WrongBase
from engine.registry.checks import CheckedAdapter, Limits, check_adapter
from engine.registry.fingerprint import Base

LIMITS = Limits(max_rank=16, max_bytes=10_000_000)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
# The expression that Unsloth writes for language layers, with fewer names.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|v_proj)))"
)
OTHER = "sha256:" + "0" * 64


def check(adapter, base: Base, declared: str | None = None) -> CheckedAdapter:
    """Write the adapter and check it."""
    return check_adapter(adapter.write(), base, LIMITS, declared or base.fingerprint)


def test_a_valid_adapter_passes(adapter, base: Base) -> None:
    """A plain LoRA adapter passes without a warning and is described rightly."""
    checked = check(adapter, base)
    assert (checked.rank, checked.alpha, checked.targets) == (4, 8.0, ("q_proj", "v_proj"))
    assert checked.warnings == ()
    assert [file.path for file in checked.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert not checked.base.assumed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", ["pissa"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("use_bdlora", {"x": 1}),
        ("use_qalora", True),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.w1"]),
        ("fan_in_fan_out", True),
        ("megatron_config", {"x": 1}),
        ("use_rslora", "yes"),
        ("r", 0),
        ("r", True),
        ("r", "4"),
        ("r", None),
        ("r", 17),
        ("rank_pattern", {"q_proj": 32}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(a+)+": 4}),
        ("rank_pattern", {"(a|a)" * 5: 4}),
        ("rank_pattern", {"a?" * 40 + "a" * 40: 4}),
        ("rank_pattern", {"(?x)(a+) +": 4}),
        ("lora_alpha", 0),
        ("lora_alpha", -1),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", None),
        ("alpha_pattern", {"q_proj": 0}),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("layers_to_transform", "all"),
    ],
)
def test_config_refusals_name_the_field(adapter, base: Base, field: str, value: object) -> None:
    """What the configuration must not say is refused by field."""
    adapter.config[field] = value
    with pytest.raises(InvalidAdapter) as caught:
        check(adapter, base)
    assert field in caught.value.where
    assert caught.value.fix


def rename(old: str, new: str) -> Callable:
    """A change of tensor names."""
    return lambda adapter: adapter.tensors.update(
        {name.replace(old, new): adapter.tensors.pop(name) for name in list(adapter.tensors)}
    )


def drop(part: str) -> Callable:
    """A change that leaves tensors out."""
    return lambda adapter: [adapter.tensors.pop(name) for name in list(adapter.tensors) if part in name]


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """A change of one tensor."""
    return lambda adapter: adapter.tensors.update({name: np.ascontiguousarray(change(adapter.tensors[name]))})


def poison(value: float, dtype: str = "float32") -> Callable[[np.ndarray], np.ndarray]:
    """A change of one number, and of the dtype."""

    def change(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.astype(dtype)
        tensor[1, 1] = value
        return tensor

    return change


def zero_b(adapter) -> None:
    """Make the adapter a no-op, with negative zeros for good measure."""
    for name, tensor in adapter.tensors.items():
        if "lora_B" in name:
            tensor[:] = -0.0


def extra_layer(adapter) -> None:
    """Add a layer that the base lacks."""
    for side in "AB":
        name = f"{Q0}.lora_{side}.weight"
        adapter.tensors[name.replace("layers.0", "layers.77")] = adapter.tensors[name]


def configure(**fields: object) -> Callable:
    """A change of the configuration."""
    return lambda adapter: adapter.config.update(fields)


def both(*changes: Callable) -> Callable:
    """Several changes."""
    return lambda adapter: [change(adapter) for change in changes]


def narrow(adapter) -> None:
    """Cut every A to 12 of 16 columns."""
    for name, tensor in adapter.tensors.items():
        if "lora_A" in name:
            adapter.tensors[name] = np.ascontiguousarray(tensor[:, :12])


@pytest.mark.parametrize(
    ("change", "kind", "where"),
    [
        pytest.param(narrow, "shape", "lora_A", id="smaller dims"),
        pytest.param(put(f"{Q0}.lora_B.weight", lambda t: np.tile(t, (2, 1))), "shape", Q0, id="larger dims"),
        pytest.param(put(f"{Q0}.lora_A.weight", lambda t: t.reshape(-1)), "shape", Q0, id="one dimension"),
        pytest.param(
            rename("base_model.model.", "base_model.model.language_model."), "prefix", "language_model", id="prefix"
        ),
        pytest.param(
            rename("layers.0.self_attn.q_proj", "layers.0.self_attn.query"), "layers", "query", id="one unknown module"
        ),
        pytest.param(rename("base_model.model.", ""), "tensor names", "model.layers", id="no peft prefix"),
        pytest.param(rename("lora_A.weight", "lora_A.default.weight"), "tensor names", "default", id="adapter name"),
        pytest.param(rename("lora_A", "lora_embedding_A"), "embedding", "lora_embedding_A", id="embedding"),
        pytest.param(
            rename("layers.0.self_attn.q_proj", "embed_tokens"), "embedding", "embed_tokens", id="embed_tokens"
        ),
        pytest.param(extra_layer, "layers", "layers.77", id="nonexistent layer"),
        pytest.param(drop("layers.1."), "coverage", "layers.1.", id="half the layers"),
        pytest.param(drop("layers.0.self_attn.v_proj"), "coverage", "v_proj", id="one module of one layer"),
        pytest.param(drop("v_proj"), "targets", "target_modules", id="a whole target without tensors"),
        pytest.param(configure(target_modules=["q_proj"]), "targets", "v_proj", id="tensors that are not targeted"),
        pytest.param(
            configure(target_modules=["q_proj", "v_proj", "zz"]), "targets", "target_modules", id="no layer zz"
        ),
        pytest.param(configure(target_modules="all-linear"), "targets", "target_modules", id="all-linear, but not all"),
        pytest.param(configure(target_modules=r".*(.*a)+"), "pattern", "target_modules", id="endless expression"),
        pytest.param(drop(f"{Q0}.lora_B"), "pairs", f"{Q0}.lora_A", id="A without B"),
        pytest.param(drop(f"{Q0}.lora_A"), "pairs", f"{Q0}.lora_B", id="B without A"),
        pytest.param(zero_b, "no effect", "adapter_model", id="all B zero"),
        pytest.param(configure(r=2, lora_alpha=4), "rank", "lora_A", id="config rank is not the tensors'"),
        pytest.param(configure(rank_pattern={"q_proj": 8}), "rank", "q_proj", id="rank_pattern is not the tensors'"),
        pytest.param(put(f"{Q0}.lora_A.weight", poison(np.nan)), "values", Q0, id="NaN"),
        pytest.param(put(f"{Q0}.lora_B.weight", poison(np.inf, "float16")), "values", Q0, id="infinite half"),
        pytest.param(put(f"{Q0}.lora_B.weight", lambda t: t.astype("float64")), "dtype", Q0, id="float64"),
        pytest.param(put(f"{Q0}.lora_B.weight", lambda t: t.astype("int8")), "dtype", Q0, id="int8"),
        pytest.param(lambda adapter: adapter.tensors.clear(), "tensors", "adapter_model", id="no tensors"),
    ],
)
def test_tensor_refusals_name_the_tensor(adapter, base: Base, change: Callable, kind: str, where: str) -> None:
    """Tensors that do not fit the base or the configuration are refused by name."""
    change(adapter)
    with pytest.raises(InvalidAdapter) as caught:
        check(adapter, base)
    assert caught.value.check == kind
    assert where in caught.value.where
    assert caught.value.fix


def test_shape_refusals_name_both_shapes(adapter, base: Base) -> None:
    """A tensor that would be copied into a corner is told with what it is and what it should be."""
    narrow(adapter)
    with pytest.raises(InvalidAdapter, match=r"\[4, 12\].*\[4, 16\]"):
        check(adapter, base)


@pytest.mark.parametrize(
    "change",
    [
        configure(target_modules=r".*\.self_attn\.(q_proj|v_proj)"),
        configure(target_modules=UNSLOTH),
        configure(target_modules=["self_attn.q_proj", "v_proj"]),
        configure(layers_to_transform=[0, 1, 2]),
        both(configure(layers_to_transform=[0]), drop("layers.1.")),
        both(configure(layers_to_transform=1), drop("layers.0.")),
        both(configure(exclude_modules=["layers.1.self_attn.v_proj"]), drop("layers.1.self_attn.v_proj")),
        configure(use_rslora=True, lora_alpha=4, init_lora_weights="gaussian"),
        both(
            configure(rank_pattern={"layers.0.self_attn.q_proj": 2}),
            put(f"{Q0}.lora_A.weight", lambda t: t[:2]),
            put(f"{Q0}.lora_B.weight", lambda t: t[:, :2]),
        ),
    ],
)
def test_unusual_but_right_adapters_pass(adapter, base: Base, change: Callable) -> None:
    """What PEFT can write and vLLM serves rightly is accepted."""
    change(adapter)
    assert check(adapter, base).rank == 4


def test_bf16_values_are_checked(adapter, base: Base) -> None:
    """BF16, which numpy does not know, is searched for NaN as well."""
    folder = adapter.write()
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # Twice as many BF16 numbers would fit, so halve every tensor by keeping the upper half of each float.
    body, start = b"", 0
    for entry in (e for n, e in sorted(header.items(), key=lambda i: str(i[1])) if n != "__metadata__"):
        low, high = entry["data_offsets"]
        upper = np.frombuffer(data[8 + length + low : 8 + length + high], "<u2")[1::2].tobytes()
        entry.update(dtype="BF16", data_offsets=[start, start + len(upper)])
        body, start = body + upper, start + len(upper)
    text = json.dumps(header).encode()
    good = len(text).to_bytes(8, "little") + text + body
    path.write_bytes(good)
    assert check_adapter(folder, base, LIMITS, base.fingerprint).rank == 4
    path.write_bytes(good[:-2] + b"\xc0\x7f")
    with pytest.raises(InvalidAdapter, match="NaN"):
        check_adapter(folder, base, LIMITS, base.fingerprint)


@pytest.mark.parametrize("source", ["declared", "run.json"])
def test_another_base_is_refused(adapter, base: Base, source: str) -> None:
    """A recorded fingerprint other than the served one is refused, naming both."""
    adapter.files["run.json"] = json.dumps({"base": {"fingerprint": OTHER}}).encode()
    with pytest.raises(WrongBase) as caught:
        check_adapter(adapter.write(), base, LIMITS, OTHER if source == "declared" else None)
    assert OTHER in str(caught.value)
    assert base.fingerprint in str(caught.value)


def test_an_unrecorded_base_is_assumed_and_said(adapter, base: Base) -> None:
    """Without any record the served base is assumed, with a warning."""
    checked = check_adapter(adapter.write(), base, LIMITS, None)
    assert checked.base.assumed
    assert any("assumed" in warning for warning in checked.warnings)


def test_the_run_record_is_read(adapter, base: Base) -> None:
    """run.json says what the adapter was trained on, so nothing is assumed."""
    run = {"run_id": "r1", "base": {"name": "tiny", "fingerprint": base.fingerprint}, "evaluation": {"score": 1}}
    adapter.files["run.json"] = json.dumps(run).encode()
    checked = check_adapter(adapter.write(), base, LIMITS, None)
    assert checked.run == run
    assert not checked.base.assumed


@pytest.mark.parametrize(("alpha", "warns"), [(1, True), (2, False), (16, False), (17, True)])
def test_unusual_scales_warn(adapter, base: Base, alpha: int, warns: bool) -> None:
    """A scale outside 0.5 to 4 is a warning, not a refusal."""
    adapter.config["lora_alpha"] = alpha
    assert bool(check(adapter, base).warnings) == warns


@pytest.mark.parametrize(("alpha", "warns"), [(0.9, True), (4, False), (8, False), (16, False), (17, True)])
def test_with_rank_stabilisation_both_habits_are_usual(adapter, base: Base, alpha: float, warns: bool) -> None:
    """Alpha by the root of the rank, or what it would be without; PEFT divides it by the root either way."""
    adapter.config |= {"lora_alpha": alpha, "use_rslora": True}
    warnings = check(adapter, base).warnings
    assert bool(warnings) == warns
    assert all("between the square root of the rank and twice the rank" in warning for warning in warnings)


def test_another_base_name_warns(adapter, base: Base) -> None:
    """Names prove nothing, but another one is worth a warning."""
    adapter.config["base_model_name_or_path"] = "org/Llama-3.1-70B/"
    assert "Llama-3.1-70B" in check(adapter, base).warnings[0]
    adapter.config["base_model_name_or_path"] = "org/TINY"
    assert check(adapter, base).warnings == ()


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "training_args.bin", "x.pt", "x.pth", "x.PKL", "x.ckpt", "run.py", "model.safetensors",
     ".hidden.json", "manifest.json", "a b.json", "optimizer", ".claim"],
)  # fmt: skip
def test_other_files_are_refused_by_name(adapter, base: Base, name: str) -> None:
    """Nothing but safetensors and text is accepted."""
    adapter.files[name] = b"{}"
    with pytest.raises(InvalidAdapter) as caught:
        check(adapter, base)
    assert name in caught.value.where


def test_text_files_are_accepted(adapter, base: Base) -> None:
    """A model card, a template and other text may come along."""
    adapter.files |= {"README.md": b"# hi", "chat_template.jinja": b"x", "notes.txt": b"x", "tokenizer.json": b"{}"}
    assert len(check(adapter, base).files) == 6


def make_symlink(path: Path) -> None:
    """Link to a file elsewhere."""
    path.symlink_to("/etc/hostname")


def make_hard_link(path: Path) -> None:
    """Give a file elsewhere a second name."""
    outside = path.parent.parent / "outside.json"
    outside.write_text("{}")
    os.link(outside, path)


@pytest.mark.parametrize("make", [make_symlink, make_hard_link, Path.mkdir, os.mkfifo])
def test_only_plain_files_are_accepted(adapter, base: Base, make: Callable[[Path], None]) -> None:
    """Links, folders and pipes are refused by name."""
    make(adapter.write() / "extra.json")
    with pytest.raises(InvalidAdapter, match=r"extra\.json"):
        check(adapter, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(adapter, base: Base, name: str) -> None:
    """Both PEFT files must be there."""
    (adapter.write() / name).unlink()
    with pytest.raises(InvalidAdapter, match=name):
        check_adapter(adapter.folder, base, LIMITS, base.fingerprint)


def test_a_missing_folder_is_refused(base: Base, tmp_path: Path) -> None:
    """A folder that is not there is said so, by its last name only."""
    with pytest.raises(InvalidAdapter) as caught:
        check_adapter(tmp_path / "nothing", base, LIMITS)
    assert str(tmp_path) not in str(caught.value)


def test_large_adapters_are_refused(adapter, base: Base) -> None:
    """The size limit holds for all files together."""
    with pytest.raises(InvalidAdapter, match="limit is 100"):
        check_adapter(adapter.write(), base, Limits(max_rank=16, max_bytes=100), base.fingerprint)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "run.json"])
def test_damaged_json_is_refused(adapter, base: Base, name: str, content: bytes) -> None:
    """A JSON file that is no object is refused by name."""
    (adapter.write() / name).write_bytes(content)
    with pytest.raises(InvalidAdapter, match=name.replace(".", r"\.")):
        check_adapter(adapter.folder, base, LIMITS, base.fingerprint)


@pytest.mark.parametrize("content", [{"run_id": 5}, {"base": "x"}, {"evaluation": [1]}])
def test_malformed_run_records_are_refused(adapter, base: Base, content: dict) -> None:
    """run.json's known fields have known kinds."""
    adapter.files["run.json"] = json.dumps(content).encode()
    with pytest.raises(InvalidAdapter, match=r"run\.json"):
        check(adapter, base)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"run_id": "r" * 257}, "run_id"),
        ({"evaluation": {"log": "x" * 65527}}, "evaluation"),
        ({"evaluation": {"log": "é" * 32764}}, "evaluation"),
    ],
)
def test_run_records_are_held_to_the_header(adapter, base: Base, content: dict, field: str) -> None:
    """What run.json says of a version goes to everybody who watches: it is no longer than a header's, to the byte."""
    adapter.files["run.json"] = json.dumps(content).encode()
    with pytest.raises(InvalidAdapter, match=r"longer than") as caught:
        check(adapter, base)
    assert caught.value.where == f"run.json: {field}"
    fits = {"run_id": "r" * 256, "evaluation": {"log": "x" * 65526}}
    adapter.files["run.json"] = json.dumps(fits).encode()
    assert check(adapter, base).run == fits


def damage(path: Path, how: str) -> None:
    """Damage the bytes of a safetensors file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if how == "truncated":
        data = data[:-10]
    elif how == "only a prefix":
        data = data[:5]
    elif how == "appended":
        data += b"more"
    elif how == "header length":
        data[6] ^= 0x40
    else:
        offset = {"header start": 8, "header middle": 8 + length // 2, "header end": 7 + length}[how]
        data[offset] ^= 0x80
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["truncated", "only a prefix", "appended", "header length", "header start", "header middle", "header end"]
)
def test_damaged_tensors_are_refused(adapter, base: Base, how: str) -> None:
    """A file that is cut off, lengthened or bit-flipped in its header is refused."""
    damage(adapter.write() / "adapter_model.safetensors", how)
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors"):
        check_adapter(adapter.folder, base, LIMITS, base.fingerprint)
