"""Writing an adapter into its base's weights, shard by shard, in float32 arithmetic.

Only a base in 16 or 32 bits can take an adapter. A 4-bit weight is one of sixteen values a block; what an adapter changes is a
sixteenth to a thirtieth of the step between them, so that quantising again rounds it away. A version trained by QLoRA knows
the quantisation error of its base, so it is merged into the dequantised weights or the original ones, whichever answers better.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import MergeRefused, NoSpace
from engine.registry.fingerprint import check_base
from engine.tuning.deltas import Deltas

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CARD = "README.md"
_QUANTISED = re.compile(r"[48]|awq|gptq|gguf")  # nf4, int8, 4bit, q4_k_m
Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a module's name and its weight, returns the weight to write, float32."""


def onto_base(deltas: Deltas) -> Change:
    """The original weight and the adapter's change."""
    return lambda module, weight: weight.float() + deltas.of(module)


def onto_dequantized(deltas: Deltas, precision: str) -> Change:
    """The weight as 4 bits have it, and the adapter's change: what a QLoRA adapter was trained on."""
    return lambda module, weight: four_bits(weight, precision) + deltas.of(module)


def into_four_bits(deltas: Deltas, precision: str) -> Change:
    """What is left after the sum is quantised again; only ever made to show what it would cost."""
    return lambda module, weight: four_bits(four_bits(weight, precision) + deltas.of(module), precision)


def four_bits(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """A weight after quantisation to "nf4" or "fp4" ("-double": with quantised scales) and back, float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    kind, _, double = precision.partition("-")
    packed, state = quantize_4bit(weight.float().contiguous(), quant_type=kind, compress_statistics=bool(double))
    result: torch.Tensor = dequantize_4bit(packed, state)
    return result.float()


def check_target(base: Path, target: str) -> None:
    """Raise MergeRefused when the merge would be into quantised weights, by request or because the base has no others.

    Also when nothing is known by the name `target`.
    """
    known = target in ("auto", "base", "dequantized")
    if not known and not _QUANTISED.search(target.casefold()):
        raise MergeRefused(f"unknown target {target!r}", fix="Merge onto base, dequantized or auto.")
    if not known:
        raise MergeRefused(
            f"merging into {target} weights would erase the adapter: its change is a small part of a 4-bit step, and "
            "rounds away",
            fix="Merge onto base or dequantized, then quantise the merged model; --demonstrate-4bit measures what is lost.",
        )
    config, _ = check_base(base)
    if "quantization_config" in config:
        raise MergeRefused(
            f"{base.name} is quantised, and merging into it would erase the adapter",
            fix="Name the model that it was quantised from, with --model.",
        )


def write_merged(
    base: Path,
    deltas: Deltas,
    change: Change,
    others: Change | None,
    out: Path,
    dtype: str,
    step: Callable[[str], None],
) -> None:
    """Write the merged model to the new folder `out`; `others` changes linear layers without an adapter (none: copied).

    No more than one shard is in memory. Raises NoSpace before anything is written, MergeRefused when a layer is missing.
    """
    _, tensors = check_base(base)
    if missing := sorted(deltas.modules - {name.removesuffix(".weight") for name in tensors}):
        raise MergeRefused(f"the base has no layer {missing[0]}", fix="Name the base that the adapter was trained on.")
    shards = sorted({tensor.path for tensor in tensors.values()})
    needed = sum(shard.stat().st_size for shard in shards) * (2 if dtype == "float32" else 1)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise NoSpace("the merged model", f"{needed / 1e9:.1f} GB", f"{free / 1e9:.1f} GB")
    out.mkdir()
    try:
        for shard in shards:
            step(shard.name)
            _write_shard(shard, deltas, change, others, out / shard.name, DTYPES.get(dtype))
        _copy_others(base, out, dtype)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _write_shard(
    shard: Path, deltas: Deltas, change: Change, others: Change | None, target: Path, dtype: torch.dtype | None
) -> None:
    merged: dict[str, torch.Tensor] = {}
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            weight = file.get_tensor(name)
            module = name.removesuffix(".weight")
            if module in deltas.modules:
                changed = change(module, weight)
            elif others and weight.dim() == 2 and is_linear(name):
                changed = others(module, weight)
            else:
                changed = weight
            merged[name] = changed.to(dtype or weight.dtype).contiguous()
    save_file(merged, target, {"format": "pt"})


def is_linear(name: str) -> bool:
    """Whether bitsandbytes would quantise this weight: linear layers, but for the output layer and embeddings."""
    return ".layers." in name or ".h." in name


def _copy_others(base: Path, out: Path, dtype: str) -> None:
    for path in base.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    config = json.loads((base / "config.json").read_text())
    if dtype in DTYPES:
        config["dtype"] = config["torch_dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_card(out: Path, facts: dict[str, Any]) -> None:
    """Write the model card: what was merged into what, how, and what the checks found."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = f"""---
base_model: {facts["base"]}
tags: [lora, merged]
---
# {facts["adapter"]} merged into {facts["base"]}

Made by `loraplex merge`: the adapter's weights are part of the model, in float32 arithmetic, then rounded once.

| | |
|---|---|
{rows}
"""
    (out / _CARD).write_text(text)
