"""Adapters trained elsewhere as plain LoRA: renamed, freed of what lies beside them, and converted where that is exact.

PiSSA, OLoRA and the like begin with a part of the base's weight W in the adapter, B0 A0, and take it out of W. What they change
is s (B A - B0 A0): a plain LoRA of twice the rank. LoftQ puts quantised weights in W's place, so what it trains belongs to
those. DoRA scales each row of W + s B A to a learnt length, which changes W in full rank; only where the lengths are still
what they were is it a plain LoRA.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.errors import InvalidAdapter
from engine.registry.config_checks import TAKEN_OUT
from engine.registry.file_checks import CONFIG, RUN, WEIGHTS, read_json
from engine.registry.fingerprint import check_base

Tensors = dict[str, torch.Tensor]
_KEPT = frozenset({CONFIG, WEIGHTS, RUN, "README.md"})
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|default)\.")
_MAGNITUDE = re.compile(r"(.*)\.lora_magnitude_vector(?:\.weight)?$")
_PREFIX = "base_model.model."
_LFS = b"version https://git-lfs"  # how a file begins that stands for one that was not fetched
_SAME = 1e-3  # relative difference of two lengths that rounding to 16 bits explains


@dataclass(frozen=True)
class Imported:
    """What became of a folder: what was done to it, and which of its files were left out."""

    done: tuple[str, ...]
    left_out: tuple[str, ...]


def import_adapter(
    source: Path,
    target: Path,
    base: Path | None = None,
    initial: Path | None = None,
    precision: str | None = None,
) -> Imported:
    """Write the plain LoRA that `source` amounts to into the new folder `target`.

    `base` is needed for PiSSA and DoRA, unless `initial` holds the adapter as it began. `precision`, one of PRECISIONS, is how
    the base was held in training, where the folder does not say. Raises InvalidAdapter naming what cannot be converted.
    """
    config, tensors = _read(source)
    done = []
    tensors, renamed = _plain_names(tensors)
    if renamed:
        done.append("names without wrappers")
    if config.get("use_dora"):
        tensors = _without_magnitudes(tensors, config, _needed(base, "use_dora", "DoRA"))
        config["use_dora"] = False
        done.append("DoRA with unchanged lengths, as plain LoRA")
    beginning = str(config.get("init_lora_weights", True)).lower()
    if beginning in ("eva", "mica"):  # B or A begins with zeros, so the base stays as it is
        config["init_lora_weights"] = True
        done.append(f"{beginning}, as the plain LoRA that it is")
    elif beginning not in ("true", "false", "none", "gaussian", "orthogonal"):
        if not TAKEN_OUT.fullmatch(beginning):
            problem = f"{beginning[:60]!r} is none of the kinds that are known to be a plain LoRA on the base as it is"
            fix = "Train it again as plain LoRA."
            raise InvalidAdapter("config", f"{CONFIG}: init_lora_weights", problem, fix=fix)
        tensors = _difference(tensors, config, _beginning(beginning, tensors, config, base, initial))
        done.append(f"{beginning}, as plain LoRA of twice the rank")
    _write(target, source, config, tensors)
    if precision:
        _note_precision(target, precision)
    return Imported(tuple(done), tuple(sorted(path.name for path in source.iterdir() if path.name not in _KEPT)))


def check_names(names: Collection[str]) -> None:
    """Raise InvalidAdapter when an adapter's own files are not among the names in its folder, here or elsewhere."""
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in names]:
        pickle = missing == [WEIGHTS] and "adapter_model.bin" in names
        problem = "there is only a pickle file, which can run code" if pickle else "the file is missing"
        fix = "Save the adapter with safe_serialization." if pickle else f"Name a folder with {CONFIG} and {WEIGHTS}."
        raise InvalidAdapter("files", missing[0], problem, fix=fix)


def _read(source: Path) -> tuple[dict[str, Any], Tensors]:
    check_names([path.name for path in source.iterdir()] if source.is_dir() else [])
    config = read_json(source, CONFIG)
    try:
        return config, load_file(source / WEIGHTS)
    except SafetensorError as error:
        with (source / WEIGHTS).open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
        problem = "it only stands for a file that git-lfs has not fetched" if pointer else f"it is damaged: {error}"
        fix = "Fetch it: git lfs pull." if pointer else "Copy the adapter again."
        raise InvalidAdapter("files", WEIGHTS, problem, fix=fix) from error


def _plain_names(tensors: Tensors) -> tuple[Tensors, bool]:
    """torch.compile, FSDP and PEFT's own names for several adapters leave their marks in tensors' names."""
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return plain, set(plain) != set(tensors)


def _needed(base: Path | None, field: str, what: str) -> Path:
    if base is None:
        problem = f"{what} can only be judged beside the base"
        raise InvalidAdapter(
            "config", f"{CONFIG}: {field}", problem, fix="Name the base that it was trained on: --model."
        )
    return base


def _scale(config: Mapping[str, Any]) -> float:
    rank, alpha = _number(config, "r"), _number(config, "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: Mapping[str, Any], field: str) -> float:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        fix = f"Write {CONFIG} again with the program that made it."
        raise InvalidAdapter("config", f"{CONFIG}: {field}", "it is missing, or no number above 0", fix=fix)
    return float(value)


def _modules(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))


def _weight(base: Path, module: str) -> torch.Tensor:
    """A module's weight in the base, float32."""
    name = f"{module.removeprefix(_PREFIX)}.weight"
    _, places = check_base(base)
    if name not in places:
        raise InvalidAdapter(
            "modules", module, "the base has no such layer", fix="Name the base that it was trained on."
        )
    with safe_open(places[name].path, framework="pt") as file:
        return file.get_tensor(name).float()


def _change(tensors: Tensors, module: str, scale: float) -> torch.Tensor:
    return scale * (tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float())


def _without_magnitudes(tensors: Tensors, config: Mapping[str, Any], base: Path) -> Tensors:
    lengths = {match[1]: tensor for name, tensor in tensors.items() if (match := _MAGNITUDE.match(name))}
    worst, where = 0.0, ""
    for module, wanted in lengths.items():
        present = (_weight(base, module) + _change(tensors, module, _scale(config))).norm(dim=1)
        off = float((wanted.float().flatten() / present - 1).abs().max())
        if off >= worst:
            worst, where = off, module
    if worst > _SAME:
        problem = f"DoRA has learnt other lengths ({where}: by up to {worst:.1%}), which no plain LoRA can express"
        raise InvalidAdapter("config", f"{CONFIG}: use_dora", problem, fix="Train it again as plain LoRA.")
    return {name: tensor for name, tensor in tensors.items() if not _MAGNITUDE.match(name)}


def _beginning(
    kind: str, tensors: Tensors, config: Mapping[str, Any], base: Path | None, initial: Path | None
) -> Tensors:
    """The adapter as it was when training began."""
    if initial is not None:
        return _plain_names(_read(initial)[1])[0]
    if kind != "pissa":
        problem = f"{kind} cannot be converted without the adapter as it began"
        fix = "Name the folder with the initial adapter: --initial FOLDER; or train it again as plain LoRA."
        raise InvalidAdapter("config", f"{CONFIG}: init_lora_weights", problem, fix=fix)
    folder, scale = _needed(base, "init_lora_weights", "PiSSA"), _scale(config)
    return {name: tensor for module in _modules(tensors) for name, tensor in _principal(folder, module, config, scale)}


def _principal(base: Path, module: str, config: Mapping[str, Any], scale: float) -> list[tuple[str, torch.Tensor]]:
    """PiSSA's beginning: the largest singular values of the weight (Meng et al., 2024)."""
    left, values, right = torch.linalg.svd(_weight(base, module), full_matrices=False)
    rank = int(config["r"])
    roots = (values[:rank] / scale).sqrt()
    return [
        (f"{module}.lora_A.weight", roots[:, None] * right[:rank]),
        (f"{module}.lora_B.weight", left[:, :rank] * roots),
    ]


def _difference(tensors: Tensors, config: dict[str, Any], before: Tensors) -> Tensors:
    """B A - B0 A0 as one product: A above A0, B beside -B0. The scale stays, so alpha grows with the rank."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problem = "ranks that differ by layer cannot be converted"
        raise InvalidAdapter("config", f"{CONFIG}: rank_pattern", problem, fix="Train it again as plain LoRA.")
    found: Tensors = {}
    for module in _modules(tensors):
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if a not in before or b not in before:
            raise InvalidAdapter("tensors", a, "the initial adapter lacks it", fix="Name the right --initial folder.")
        found[a] = torch.cat([tensors[a].float(), before[a].float()])
        found[b] = torch.cat([tensors[b].float(), -before[b].float()], dim=1)
    scale = _scale(config)
    config["r"] *= 2
    config["lora_alpha"] = scale * (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    config["init_lora_weights"] = True
    return found


def _write(target: Path, source: Path, config: dict[str, Any], tensors: Tensors) -> None:
    target.mkdir(parents=True)
    config["base_model_name_or_path"] = str(config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS, {"format": "pt"})
    for name in (RUN, "README.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _note_precision(target: Path, precision: str) -> None:
    """Have the run's record say how the base was held, beside whatever else it says."""
    run = read_json(target, RUN) if (target / RUN).is_file() else {}
    about = run.get("base")
    run["base"] = {**(about if isinstance(about, dict) else {}), "precision": precision}
    (target / RUN).write_text(json.dumps(run, indent=2) + "\n")
