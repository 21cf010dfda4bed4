"""Whether an adapter's tensors fit the base, layer by layer: vLLM loads most that do not without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Never

import numpy as np
import safetensors

from engine.errors import InvalidAdapter
from engine.registry.config_checks import LoraConfig
from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.registry.fingerprint import Base, TensorInfo, read_safetensors_header
from engine.registry.patterns import ends_with, matching

_NAME = re.compile(r"base_model\.model\.(?P<module>[^\s]+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings"})
_OUTPUTS = frozenset({"lm_head", "embed_out", "output"})
_RIGHT_BASE = "Train the adapter on the base that this server serves."
_SAVE_AGAIN = "Save the adapter again with PEFT's save_pretrained."
_DIVERGED = "Train again: the training diverged."
_MOST = 65504.0  # the largest float16
# Per dtype: how to read it as whole numbers, its exponent's bits (all ones: NaN or infinite), all bits but the sign.
_BITS = {
    "F32": ("<u4", 0x7F80_0000, 0x7FFF_FFFF),
    "F16": ("<u2", 0x7C00, 0x7FFF),
    "BF16": ("<u2", 0x7F80, 0x7FFF),
}


@dataclass
class _Pair:
    """The two tensors of one module: "A" (rank, in) and "B" (out, rank)."""

    sides: dict[str, tuple[str, TensorInfo]] = field(default_factory=dict)


def adaptable_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The last names of the layers that an adapter of a base with these tensors may change: "q_proj", "down_proj", ...

    Embeddings and the output layer are left out. vLLM 0.32's LoRA output layer fails the whole engine when one request asks
    for its prompt's log probabilities in a batch with others, and costs every token a product with the vocabulary.
    """
    names = {name.split(".")[-2] for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    return tuple(sorted(names - _EMBEDDINGS - _OUTPUTS))


def check_tensors(folder: Path, config: LoraConfig, base: Base) -> tuple[str, ...]:
    """Check every tensor against configuration and base; return the names of the modules that the adapter changes."""
    pairs = _pairs(_header(folder / WEIGHTS))
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in base.shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    _check_modules(pairs, layers)
    for module, pair in pairs.items():
        _check_shapes(pair, config.rank_of(module), layers[module])
    _check_coverage(set(pairs), config, layers)
    _check_values(folder / WEIGHTS, pairs, config)
    return tuple(sorted(pairs))


def _refuse(check: str, where: str, problem: str, fix: str = _RIGHT_BASE) -> Never:
    raise InvalidAdapter(check, where, problem, fix=fix)


def _header(path: Path) -> dict[str, TensorInfo]:
    fix = "Copy the file again: it is cut off or changed."
    try:
        # The library checks what our own reader leaves out: overlaps, gaps, sizes that contradict shapes.
        with safetensors.safe_open(path, framework="np"):
            pass
        header = read_safetensors_header(path)
    except (ValueError, safetensors.SafetensorError) as error:
        raise InvalidAdapter("safetensors", WEIGHTS, "the file is no whole safetensors file", fix=fix) from error
    if not header:
        _refuse("tensors", WEIGHTS, "the file holds no tensors", _SAVE_AGAIN)
    return header


def _pairs(header: dict[str, TensorInfo]) -> dict[str, _Pair]:
    pairs: dict[str, _Pair] = {}
    for name, tensor in header.items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"].rpartition(".")[2] in _EMBEDDINGS:
            _refuse_name(name)
        if match["module"].rpartition(".")[2] in _OUTPUTS:
            _refuse(
                "output layer", name, "LoRA on the output layer is not supported", "Train without the output layer."
            )
        if tensor.dtype not in _BITS:
            _refuse("dtype", name, f"dtype {tensor.dtype} is none of F32, F16 and BF16", "Save the tensors as BF16.")
        pairs.setdefault(match["module"], _Pair()).sides[match["side"]] = (name, tensor)
    for pair in pairs.values():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair.sides:
                name = pair.sides[other][0]
                _refuse("pairs", name, f"the tensor has no lora_{side} beside it", _SAVE_AGAIN)
    return pairs


def _refuse_name(name: str) -> Never:
    if "embed" in name:
        _refuse("embedding", name, "LoRA on token embeddings is not supported", "Train without the embedding layer.")
    if not name.startswith("base_model.model."):
        _refuse("tensor names", name, "the name does not begin with 'base_model.model.'", _SAVE_AGAIN)
    _refuse("tensor names", name, "the name does not end with '.lora_A.weight' or '.lora_B.weight'", _SAVE_AGAIN)


def _check_modules(modules: Iterable[str], layers: Mapping[str, tuple[int, ...]]) -> None:
    unknown = [module for module in sorted(modules) if module not in layers]
    if not unknown:
        return
    if len(unknown) == len(set(modules)):
        _refuse_prefix(unknown[0], layers)
    _refuse("layers", unknown[0], "the base has no such layer")


def _refuse_prefix(module: str, layers: Iterable[str]) -> Never:
    """Every module is unknown: say how the base spells the one that ends most alike."""
    components = module.split(".")
    for start in range(len(components)):
        ending = ".".join(components[start:])
        if alike := next((layer for layer in sorted(layers) if ends_with(layer, ending)), None):
            problem = f"no layer of the base has this prefix: the base says {alike}"
            _refuse("prefix", module, problem, "Train on the text model, or rename the tensors to the base's names.")
    _refuse("prefix", module, "none of the adapter's layers exists in the base")


def _check_shapes(pair: _Pair, rank: int, layer: tuple[int, ...]) -> None:
    rows, columns = layer
    for side, expected in (("A", (rank, columns)), ("B", (rows, rank))):
        name, tensor = pair.sides[side]
        if tensor.shape == expected:
            continue
        found_rank = tensor.shape[0 if side == "A" else -1] if len(tensor.shape) == 2 else rank
        if found_rank != rank:
            _refuse(
                "rank",
                name,
                f"its shape {list(tensor.shape)} means rank {found_rank}, but {CONFIG} says rank {rank}",
                f"Correct r or rank_pattern in {CONFIG}, and lora_alpha with it.",
            )
        _refuse("shape", name, f"its shape {list(tensor.shape)} does not fit the base's: {list(expected)} is needed")


def _check_coverage(modules: set[str], config: LoraConfig, layers: Iterable[str]) -> None:
    where, chosen = f"{CONFIG}: target_modules", config.targets
    if chosen == "all-linear":
        wanted = {layer for layer in layers if layer.rpartition(".")[2] not in _EMBEDDINGS | _OUTPUTS}
    else:
        wanted = matching(layers, chosen, where)
    if stray := sorted(modules - wanted):
        _refuse("targets", stray[0], f"the layer has tensors, but {CONFIG} does not target it", _SAVE_AGAIN)
    chosen_at_all = bool(wanted)
    wanted -= matching(wanted, config.excluded, f"{CONFIG}: exclude_modules")
    if chosen_at_all and not wanted:
        _refuse("targets", f"{CONFIG}: exclude_modules", "it leaves no layer to change", _SAVE_AGAIN)
    if config.layers is not None:
        within = {module for module in wanted if _layer_number(module) in config.layers}
        if wanted and not within:
            _refuse("targets", f"{CONFIG}: layers_to_transform", "the base has none of these layers")
        wanted = within
    for group, members in _by_target(wanted, chosen):
        _check_group(group, members, modules)


def _by_target(wanted: set[str], chosen: tuple[str, ...] | str) -> Iterator[tuple[str, set[str]]]:
    if isinstance(chosen, str):
        chosen = tuple(sorted({module.rpartition(".")[2] for module in wanted}))
    for target in chosen:
        yield target, {module for module in wanted if ends_with(module, target)}


def _check_group(target: str, wanted: set[str], modules: set[str]) -> None:
    where = f"{CONFIG}: target_modules"
    if not wanted:
        _refuse("targets", where, f"the base has no layer {target!r}")
    missing = sorted(wanted - modules, key=lambda module: (_layer_number(module), module))
    if len(missing) == len(wanted):
        _refuse("targets", where, f"{target!r} is targeted, but has no tensors", _SAVE_AGAIN)
    if missing:
        problem = (
            f"only {len(wanted) - len(missing)} of {len(wanted)} {target} layers have tensors; here they are missing"
        )
        _refuse("coverage", missing[0], problem, "Train on a base with as many layers, or set layers_to_transform.")


def _layer_number(module: str) -> int:
    return next((int(part) for part in module.split(".") if part.isdecimal()), -1)


def _check_values(path: Path, pairs: Mapping[str, _Pair], config: LoraConfig) -> None:
    changes_something = False
    with path.open("rb") as file:
        for module, pair in pairs.items():
            largest = [_largest(file, *pair.sides[side]) for side in "AB"]
            _check_product(module, pair, largest, config)
            changes_something |= all(largest)
    if not changes_something:
        problem = "every lora_B (or lora_A) is zero: the adapter changes nothing"
        _refuse("no effect", WEIGHTS, problem, "Train for at least one step, and save afterwards.")


def _largest(file: BinaryIO, name: str, tensor: TensorInfo) -> float:
    """The largest absolute value in a tensor, if every precision that an engine computes in can hold it."""
    file.seek(tensor.start)
    kind, exponent, magnitude = _BITS[tensor.dtype]
    bits = np.frombuffer(file.read(tensor.end - tensor.start), dtype=kind)
    top = (bits & magnitude).max()  # without the sign, floating-point numbers are ordered as their bits are
    if top >= exponent:
        _refuse("values", name, "it holds NaN or infinite values", _DIVERGED)
    if tensor.dtype == "F16":
        value = float(top.view("<f2"))
    else:
        value = float((np.uint32(top) << (16 if tensor.dtype == "BF16" else 0)).view("<f4"))
    if value > _MOST:
        _refuse("values", name, f"it holds {value:.3g}, and half precision ends at {_MOST:.0f}", _DIVERGED)
    return value


def _check_product(module: str, pair: _Pair, largest: list[float], config: LoraConfig) -> None:
    """Refuse finite numbers whose product could be infinite: one such request would give NaN to whoever shares a cache."""
    product = config.rank_of(module) * largest[0] * largest[1]
    if product > _MOST:
        problem = f"lora_B times lora_A can be as large as {product:.3g}, and half precision ends at {_MOST:.0f}"
        _refuse("values", pair.sides["B"][0], problem, _DIVERGED)
    if (scaled := product * config.scale_of(module)) > _MOST:
        where = f"{CONFIG}: {config.alpha_field(module)}"
        problem = f"it scales {module} to as much as {scaled:.3g}, and half precision ends at {_MOST:.0f}"
        _refuse("values", where, problem, "Use a lora_alpha near the rank.")
