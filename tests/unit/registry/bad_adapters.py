"""A corpus of adapter folders that must never be published: damaged, hostile, or made for something else.

Each `Bad` begins with a valid adapter, written by PEFT's rules for the tiny base, and breaks one thing of it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InvalidAdapter, LoraplexError, WrongBase
from tests.unit.registry.conftest import LIMITS, AdapterFolder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers"
Q0, Q1 = f"{PREFIX}.0.self_attn.q_proj", f"{PREFIX}.1.self_attn.q_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
Change = Callable[[AdapterFolder], object]
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One broken adapter: changed before it is written, damaged after it, and what the refusal must name."""

    id: str
    check: str
    where: str
    change: Change = lambda _: None
    damage: Damage = lambda _: None
    error: type[LoraplexError] = InvalidAdapter

    def write(self, adapter: AdapterFolder) -> Path:
        """Write the folder."""
        self.change(adapter)
        folder = adapter.write()
        self.damage(folder)
        return folder


def config(id_: str, check: str = "config", where: str = "", **fields: Any) -> Bad:
    """A configuration with other values."""
    return Bad(id_, check, where or next(iter(fields)), lambda adapter: adapter.config.update(fields))


def tensors(id_: str, check: str, where: str, change: Callable[[dict[str, np.ndarray]], object], **fields: Any) -> Bad:
    """Other tensors, and other values of the configuration."""
    return Bad(id_, check, where, lambda adapter: (change(adapter.tensors), adapter.config.update(fields)))


def extra(id_: str, check: str, name: str, content: bytes = b"{}") -> Bad:
    """One file more."""
    return Bad(id_, check, name, damage=lambda folder: (folder / name).write_bytes(content))


def replaced(id_: str, check: str, name: str, content: bytes, where: str = "") -> Bad:
    """Another content of one of the two files."""
    return Bad(id_, check, where or name, damage=lambda folder: (folder / name).write_bytes(content))


def bytes_of(id_: str, change: Callable[[bytes], bytes]) -> Bad:
    """Weights whose bytes were changed."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return Bad(id_, "safetensors", WEIGHTS, damage=damage)


def header_of(id_: str, change: Callable[[dict[str, Any]], object]) -> Bad:
    """Weights whose header says something else about the same data."""

    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        return packed(json.dumps(header).encode(), data[8 + length :])

    return bytes_of(id_, rewrite)


def header_text_of(id_: str, change: Callable[[bytes], bytes]) -> Bad:
    """Weights whose header is another text."""

    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        return packed(change(data[8 : 8 + length]), data[8 + length :])

    return bytes_of(id_, rewrite)


def packed(header: bytes, body: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + body


def json_bytes(**fields: Any) -> bytes:
    """A configuration with these fields besides valid ones."""
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    return json.dumps(plain | fields).encode()


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    """A change of one tensor."""
    return lambda all_: all_.update({name: np.ascontiguousarray(change(all_[name]))})


def one(name: str, value: float, dtype: str = "float32") -> Callable[[dict[str, np.ndarray]], None]:
    """One number of one tensor replaced."""

    def change(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.astype(dtype)
        tensor[1, 1] = value
        return tensor

    return put(name, change)


def each(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    """A change of every tensor."""
    return lambda all_: all_.update({name: np.ascontiguousarray(change(name, tensor)) for name, tensor in all_.items()})


def rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    """Other names."""
    return lambda all_: all_.update({name.replace(old, new): all_.pop(name) for name in list(all_)})


def drop(part: str) -> Callable[[dict[str, np.ndarray]], None]:
    """Fewer tensors."""
    return lambda all_: [all_.pop(name) for name in list(all_) if part in name]


def add(name: str, like: str = A0) -> Callable[[dict[str, np.ndarray]], None]:
    """One tensor more."""
    return lambda all_: all_.update({name: all_[like].copy()})


def in_place_of(name: str, make: Damage) -> Damage:
    """Something else than a file under a file's name."""
    return lambda folder: ((folder / name).unlink(), make(folder / name))


def run_record(**fields: Any) -> Change:
    """A run.json."""
    return lambda adapter: adapter.files.update({"run.json": json.dumps(fields).encode()})


def many_files(folder: Path) -> None:
    """More files than an adapter has."""
    for number in range(80):
        (folder / f"notes-{number}.txt").write_text("x")


def sparse(folder: Path) -> None:
    """A file that claims to be larger than the disk, and takes no room."""
    os.truncate(folder / WEIGHTS, LIMITS.max_bytes + 2**40)


def second_name(folder: Path) -> None:
    """A file that somebody else can still write to."""
    outside = folder.parent / "outside.txt"
    outside.write_text("x")
    os.link(outside, folder / "notes.txt")


FILES = [
    Bad("no config", "files", CONFIG, damage=lambda folder: (folder / CONFIG).unlink()),
    Bad("no weights", "files", WEIGHTS, damage=lambda folder: (folder / WEIGHTS).unlink()),
    Bad("bin only", "pickle", ".bin", damage=lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin")),
    extra("pickle beside safetensors", "pickle", "adapter_model.bin", b"\x80\x04."),
    extra("pickle in disguise of case", "pickle", "X.PKL"),
    extra("optimizer state", "pickle", "optimizer.pt"),
    extra("training arguments", "pickle", "training_args.bin"),
    extra("code", "files", "modeling.py"),
    extra("shared library", "files", "kernel.so"),
    extra("shards", "files", "adapter_model-00001-of-00002.safetensors"),
    extra("second weights", "files", "model.safetensors"),
    extra("hidden file", "files", ".config.json"),
    extra("manifest of its own", "files", "manifest.json"),
    Bad("case twin", "files", "dapter_", damage=lambda folder: (folder / "Adapter_Config.json").write_text("{}")),
    extra("case twin of the weights", "files", "adapter_model.SAFETENSORS"),
    Bad("backslashes in a name", "files", "x.json", damage=lambda folder: (folder / "..\\..\\x.json").write_text("{}")),
    Bad("line break in a name", "files", "b.json", damage=lambda folder: (folder / "a\nb.json").write_text("{}")),
    Bad(
        "right-to-left override in a name", "files", "u202e",
        damage=lambda folder: (folder / "x\u202enosj.json").write_text("{}"),
    ),
    Bad("homoglyph of the config", "files", "u0430", damage=lambda f: (f / "\u0430dapter_config.json").write_text("{}")),
    Bad("byte that is no UTF-8 in a name", "files", "udcff", damage=lambda f: (f / "x\udcff.json").write_text("{}")),
    Bad("very long name", "files", "x" * 100, damage=lambda folder: (folder / f"{'x' * 200}.json").write_text("{}")),
    Bad("sub-folder", "files", "checkpoint-10", damage=lambda folder: (folder / "checkpoint-10").mkdir()),
    Bad("config is a folder", "files", CONFIG, damage=in_place_of(CONFIG, Path.mkdir)),
    Bad("config is a pipe", "files", CONFIG, damage=in_place_of(CONFIG, os.mkfifo)),
    Bad("weights are a link", "files", WEIGHTS, damage=in_place_of(WEIGHTS, lambda p: p.symlink_to("/etc/passwd"))),
    Bad("weights are an endless device", "files", WEIGHTS, damage=in_place_of(WEIGHTS, lambda p: p.symlink_to("/dev/zero"))),
    Bad("link to nowhere", "files", "x.txt", damage=lambda folder: (folder / "x.txt").symlink_to("nowhere")),
    Bad("hard link", "files", "notes.txt", damage=second_name),
    Bad("too many files", "files", "", damage=many_files),
    Bad("too large", "size", "", damage=sparse),
]  # fmt: skip

JSON = [
    replaced("empty config", "json", CONFIG, b""),
    replaced("config is a list", "json", CONFIG, b'[{"peft_type": "LORA"}]'),
    replaced("config is a number", "json", CONFIG, b"4"),
    replaced("config is cut off", "json", CONFIG, json_bytes()[:-5]),
    replaced("config is YAML", "json", CONFIG, b"peft_type: LORA\nr: 4\n"),
    replaced("config is UTF-16", "json", CONFIG, json_bytes().decode().encode("utf-16")),
    replaced("config is UTF-32", "json", CONFIG, json_bytes().decode().encode("utf-32-le")),
    replaced("config with a byte order mark", "json", CONFIG, b"\xef\xbb\xbf" + json_bytes()),
    replaced("config is no UTF-8", "json", CONFIG, json_bytes(revision="X").replace(b"X", b"\xff")),
    replaced("config says a field twice", "json", CONFIG, json_bytes()[:-1] + b', "r": 8}'),
    replaced("deeply nested config", "json", CONFIG, b'{"x":' * 50_000 + b"1" + b"}" * 50_000),
    replaced("huge config", "json", CONFIG, json_bytes(revision="x" * 5_000_000)),
    replaced(
        "number of ten thousand digits", "json", CONFIG, json_bytes()[:-1] + b', "revision": ' + b"9" * 10_000 + b"}"
    ),
    replaced("config is a picture", "json", CONFIG, b"\x89PNG\r\n\x1a\n" + bytes(100)),
]

CONFIGS = [
    *(
        config(f"peft type {kind}", peft_type=kind)
        for kind in ("IA3", "LOHA", "LOKR", "ADALORA", "PROMPT_TUNING", "VERA")
    ),
    config("peft type in small letters", peft_type="lora"),
    config("peft type is a list", peft_type=["LORA"]),
    config("no peft type", peft_type=None),
    config("DoRA", use_dora=True),
    *(
        config(f"beginning {start}", init_lora_weights=start)
        for start in ("pissa", "pissa_niter_16", "olora", "loftq", "eva", "corda", "lora_ga", "mystery")
    ),
    config("trained biases", bias="all"),
    config("biases of LoRA", lora_bias=True),
    config("fully trained modules", modules_to_save=["lm_head"]),
    config("transposed layers", fan_in_fan_out=True),
    config("replicated layers", layer_replication=[[0, 2], [1, 2]]),
    config("trained tokens", trainable_token_indices=[1, 2]),
    config("bare parameters", target_parameters=["mlp.experts.gate_up_proj"]),
    config("Megatron", megatron_config={"hidden_size": 16}),
    config("QALoRA", use_qalora=True),
    config("aLoRA", alora_invocation_tokens=[1, 2]),
    config("block diagonal", use_bdlora={"nblocks": 2}),
    config("Arrow", arrow_config={"top_k": 1}),
    config("KaSA", kasa_config={"x": 1}),
    config("rsLoRA is a text", use_rslora="true"),
    config("rank 0", r=0),
    config("negative rank", r=-4),
    config("rank of a fraction", r=4.5),
    config("rank is true", r=True),
    config("rank is a text", r="4"),
    config("rank above the limit", r=17),
    config("absurd rank", r=10**300),
    config("alpha NaN", lora_alpha=float("nan")),
    config("alpha infinite", lora_alpha=float("inf")),
    config("alpha 0", lora_alpha=0),
    config("negative alpha", lora_alpha=-8),
    config("alpha 1e308", lora_alpha=1e308),
    config("alpha is a text", lora_alpha="8"),
    config("alpha that overflows with these tensors", "values", lora_alpha=5e8),
    config("rank pattern above the limit", rank_pattern={"q_proj": 64}),
    config("rank pattern 0", rank_pattern={"q_proj": 0}),
    config("rank pattern is a list", rank_pattern=["q_proj"]),
    config("rank pattern without end", "pattern", rank_pattern={"(a+)+b": 4}),
    config("rank pattern of a megabyte", "pattern", rank_pattern={"q" * 1_000_000: 4}),
    config("rank pattern malformed", "pattern", rank_pattern={"[": 4}),
    config(
        "rank pattern against the tensors", "rank", Q0.removeprefix("base_model.model."), rank_pattern={"q_proj": 8}
    ),
    config("alpha pattern 0", alpha_pattern={"q_proj": 0}),
    config("alpha pattern infinite", alpha_pattern={"q_proj": float("inf")}),
    config("alpha pattern that overflows", "values", alpha_pattern={"q_proj": 9e8}),
    config("no targets", target_modules=[]),
    config("targets are numbers", target_modules=[1]),
    config("target that the base lacks", "targets", target_modules=["q_proj", "v_proj", "c_attn"]),
    config("target expression without end", "pattern", target_modules=r"(.*)*q_proj"),
    config("target expression of a megabyte", "pattern", target_modules="q" * 1_000_000),
    config("a layer that the base lacks", "targets", layers_to_transform=[99]),
    config("layers are a text", layers_to_transform="0-1"),
    config("everything excluded", "targets", exclude_modules=["q_proj", "v_proj"]),
]

HEADERS = [
    replaced("empty weights", "safetensors", WEIGHTS, b""),
    replaced("seven bytes", "safetensors", WEIGHTS, b"1234567"),
    replaced("weights are a zip file", "safetensors", WEIGHTS, b"PK\x03\x04" + bytes(200)),
    replaced("weights are a pickle", "safetensors", WEIGHTS, b"\x80\x04\x95" + bytes(200)),
    replaced("weights are a page of a hub", "safetensors", WEIGHTS, b"<!doctype html><title>404</title>"),
    replaced(
        "weights are a pointer", "safetensors", WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    ),
    replaced("weights without tensors", "tensors", WEIGHTS, packed(b'{"__metadata__":{"format":"pt"}}', b"")),
    bytes_of("cut off in the data", lambda data: data[:-100]),
    bytes_of("cut off in the header", lambda data: data[:40]),
    bytes_of("bytes behind the data", lambda data: data + bytes(16)),
    bytes_of("header of 2^63 bytes", lambda data: struct.pack("<Q", 2**63) + data[8:]),
    bytes_of("header of 100 GB", lambda data: struct.pack("<Q", 10**11) + data[8:]),
    bytes_of("flipped bit in the header's length", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    bytes_of("flipped bit in the header", lambda data: data[:9] + bytes([data[9] ^ 0x80]) + data[10:]),
    header_text_of("header is a list", lambda text: b"[" + text + b"]"),
    header_text_of("header is UTF-16", lambda text: text.decode().encode("utf-16")),
    header_text_of("header nests without end", lambda _: b'{"a":' * 50_000),
    header_text_of("a tensor twice", lambda text: text.rstrip()[:-1] + b"," + text.strip()[1:]),
    header_of("overlapping data", lambda header: header[A0].update(data_offsets=header[B0]["data_offsets"])),
    header_of("data outside the file", lambda header: header[A0].update(data_offsets=[10**9, 10**9 + 256])),
    header_of("negative offsets", lambda header: header[A0].update(data_offsets=[-256, 0])),
    header_of("offsets the wrong way round", lambda h: h[A0].update(data_offsets=h[A0]["data_offsets"][::-1])),
    header_of("shape larger than the data", lambda header: header[A0].update(shape=[400, 16])),
    header_of("shape that overflows", lambda header: header[A0].update(shape=[2**62, 2**62])),
    header_of("negative shape", lambda header: header[A0].update(shape=[-4, -16])),
    header_of("dtype of half the size", lambda header: header[A0].update(dtype="BF16")),
    header_of("dtype that nobody knows", lambda header: header[A0].update(dtype="F23")),
    header_of("no offsets", lambda header: header[A0].pop("data_offsets")),
    header_of("metadata is a list", lambda header: header.update(__metadata__=["pt"])),
    header_of("metadata of objects", lambda header: header.update(__metadata__={"format": {"a": 1}})),
]

TENSORS = [
    tensors("no lora_B", "pairs", A0, drop("lora_B")),
    tensors("one lora_A missing", "pairs", B0, drop(A0)),
    tensors("embedding", "embedding", "lora_embedding_A", add("base_model.model.model.embed_tokens.lora_embedding_A")),
    tensors("output layer", "output layer", "lm_head", rename("model.layers.0.self_attn.q_proj", "lm_head")),
    tensors("DoRA's magnitudes", "tensor names", "magnitude", add(f"{Q0}.lora_magnitude_vector")),
    tensors("a bias", "tensor names", "bias", add(f"{Q0}.lora_B.bias")),
    tensors("a full weight", "tensor names", "norm", add("base_model.model.model.norm.weight")),
    tensors("a hidden passenger", "tensor names", "backdoor", add("backdoor")),
    tensors("an empty name", "tensor names", "", add("")),
    tensors("no prefix", "tensor names", "model.layers", rename("base_model.model.", "")),
    tensors("diffusers' names", "tensor names", "lora.down", rename("lora_A", "lora.down")),
    tensors("adapter's name inside", "tensor names", "default", rename("lora_A.weight", "lora_A.default.weight")),
    tensors("another architecture", "prefix", "transformer.h", rename("model.model.layers", "model.transformer.h")),
    tensors("path in a name", "prefix", "../", rename("model.model.layers", "model.../../layers")),
    tensors(
        "homoglyph in a name", "layers", "q_pr", rename("layers.0.self_attn.q_proj", "layers.0.self_attn.q_pr\u043ej")
    ),
    tensors("layer out of range", "layers", "layers.7.", rename("layers.1.", "layers.7.")),
    tensors("layer number with a zero before it", "layers", "layers.01.", rename("layers.1.", "layers.01.")),
    tensors("half the layers", "coverage", "layers.1.", drop("layers.1.")),
    tensors("one module missing", "coverage", "layers.1.self_attn.v_proj", drop("layers.1.self_attn.v_proj")),
    tensors("more than is targeted", "targets", "v_proj", lambda _: None, target_modules=["q_proj"]),
    tensors("transposed", "rank", A0, each(lambda _, tensor: tensor.T)),
    tensors("one A transposed", "rank", A0, put(A0, lambda tensor: tensor.T)),
    tensors("smaller base", "shape", "lora_A", each(lambda name, t: t[:, :12] if "lora_A" in name else t)),
    tensors("larger base", "shape", "lora_B", each(lambda name, t: np.tile(t, (2, 1)) if "lora_B" in name else t)),
    tensors(
        "rank of one layer differs", "rank", Q1, each(lambda name, t: t[:2] if name == f"{Q1}.lora_A.weight" else t)
    ),
    tensors("three dimensions", "shape", A0, put(A0, lambda tensor: tensor[None])),
    tensors("one dimension", "shape", A0, put(A0, lambda tensor: tensor.reshape(-1))),
    tensors("no elements", "rank", A0, put(A0, lambda tensor: tensor[:0])),
    *(
        tensors(f"dtype {dtype}", "dtype", B0, put(B0, lambda tensor, dtype=dtype: tensor.astype(dtype)))
        for dtype in ("int8", "uint8", "int32", "int64", "bool", "float64", "complex64")
    ),
    tensors("NaN in one place", "values", B0, one(B0, np.nan)),
    tensors("NaN with a sign", "values", A0, one(A0, -np.nan)),
    tensors("infinity", "values", B0, one(B0, -np.inf)),
    tensors("infinity in half precision", "values", B0, one(B0, np.inf, "float16")),
    tensors("largest float32, infinite in bfloat16", "values", B0, one(B0, 3.4028235e38)),
    tensors("too large for float16", "values", A0, one(A0, 70_000.0)),
    tensors(
        "finite numbers whose product is not", "values", Q0, lambda all_: (one(A0, 6e4)(all_), one(B0, -6e4)(all_))
    ),
    tensors("zero B", "no effect", WEIGHTS, each(lambda name, t: t * 0 if "lora_B" in name else t)),
    tensors("zero A", "no effect", WEIGHTS, each(lambda name, t: t * -0.0 if "lora_A" in name else t)),
    tensors(
        "zero A here, zero B there",
        "no effect",
        WEIGHTS,
        each(lambda name, t: t * (("lora_A" in name) == (".0." in name))),
    ),
]

OTHER = "sha256:" + "0" * 64
BASES = [
    Bad("trained on another base", "", "", run_record(base={"fingerprint": OTHER}), error=WrongBase),
    Bad("base that is no fingerprint", "run record", "fingerprint", run_record(base={"fingerprint": 7})),
    Bad("base that says nothing", "run record", "fingerprint", run_record(base={"fingerprint": ""})),
    Bad("base that is a name", "run record", "base", run_record(base="tiny")),
    Bad("run record that is a list", "json", "run.json", lambda adapter: adapter.files.update({"run.json": b"[]"})),
]

CORPUS = [*FILES, *JSON, *CONFIGS, *HEADERS, *TENSORS, *BASES]
