"""What adapter_config.json may say: plain LoRA with a rank that fits, and nothing that vLLM would get wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from engine.errors import InvalidAdapter
from engine.registry.file_checks import CONFIG, read_json
from engine.registry.patterns import KEY, compile_safely, look_up

# Each of these changes what the adapter computes, and vLLM either refuses it or silently ignores it.
_UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "biases of LoRA layers are not supported",
    "modules_to_save": "fully trained modules are not supported",
    "layer_replication": "replicated layers are not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "fan_in_fan_out": "transposed layers (fan_in_fan_out) are not supported",
    "megatron_config": "Megatron layers are not supported",
    "kasa_config": "KaSA changes the base weights and is not supported",
    "arrow_config": "Arrow routing is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
}
# Every other way to begin changes the base weights, or PEFT's reading of the tensors.
_PLAIN_BEGINNINGS = frozenset({"gaussian", "orthogonal"})
# What PEFT takes out of the base's weights exactly as it is in the adapter, so that plain LoRA can be made of it.
TAKEN_OUT = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga")
_RETRAIN = "Train a plain LoRA adapter without it."


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides what the tensors mean."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    base_name: str

    def rank_of(self, module: str) -> int:
        """The rank of one module, by its name in the base."""
        return look_up(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor that multiplies B times A."""
        alpha, rank = look_up(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def alpha_field(self, module: str) -> str:
        """The field that holds a module's alpha."""
        return "alpha_pattern" if look_up(self.alpha_pattern, module, 0.0) else "lora_alpha"


def read_config(folder: Path, max_rank: int) -> LoraConfig:
    """Read and check adapter_config.json; raises InvalidAdapter naming the field."""
    raw = read_json(folder, CONFIG)
    if raw.get("peft_type") != "LORA":
        _refuse("peft_type", f"{_short(raw.get('peft_type'))} is not 'LORA'", "Only LoRA adapters are served.")
    _check_features(raw)
    return LoraConfig(
        rank=_rank(raw.get("r"), "r", max_rank),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
        rank_pattern={
            key: _rank(value, f"rank_pattern[{_short(key)}]", max_rank) for key, value in _patterns(raw, "rank_pattern")
        },
        alpha_pattern={
            key: _alpha(value, f"alpha_pattern[{_short(key)}]") for key, value in _patterns(raw, "alpha_pattern")
        },
        rank_stabilized=_flag(raw, "use_rslora"),
        targets=_modules(raw, "target_modules", required=True),
        excluded=_modules(raw, "exclude_modules"),
        layers=_layers(raw.get("layers_to_transform")),
        base_name=str(raw.get("base_model_name_or_path") or ""),
    )


def _refuse(field: str, problem: str, fix: str = _RETRAIN) -> Never:
    raise InvalidAdapter("config", f"{CONFIG}: {field}", problem, fix=fix)


def _check_features(raw: dict[str, Any]) -> None:
    for field, problem in _UNSUPPORTED.items():
        if raw.get(field):
            _refuse(field, problem)
    if raw.get("bias", "none") != "none":
        _refuse("bias", f"{_short(raw['bias'])} is not 'none': trained biases are not supported")
    beginning = raw.get("init_lora_weights", True)
    if not isinstance(beginning, bool | None) and str(beginning) not in _PLAIN_BEGINNINGS:
        _refuse(
            "init_lora_weights",
            f"{_short(beginning)} is not supported: it may change the base's weights when the adapter is loaded",
            "Save it as plain LoRA (PEFT: path_initial_model_for_weight_conversion), then set this to true."
            if TAKEN_OUT.fullmatch(str(beginning))
            else _RETRAIN,
        )


def _rank(value: object, field: str, max_rank: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(field, f"{_short(value)} is no whole number of 1 or more")
    if value > max_rank:
        _refuse(
            field,
            f"rank {_short(value)} is above the server's limit of {max_rank}",
            f"Train with rank {max_rank} or less, or start the server with a larger --max-rank.",
        )
    return value


def _alpha(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(field, f"{_short(value)} is no number")
    if not 0 < value < 1e9:  # false for NaN, and for infinity
        _refuse(field, f"{_short(value)} is no finite number above 0")
    return float(value)


def _flag(raw: dict[str, Any], field: str) -> bool:
    value = raw.get(field, False)
    if not isinstance(value, bool | None):
        _refuse(field, f"{_short(value)} is neither true nor false")
    return bool(value)


def _patterns(raw: dict[str, Any], field: str) -> list[tuple[str, object]]:
    content = raw.get(field) or {}
    if not isinstance(content, dict):
        _refuse(field, "it is no JSON object")
    for key in content:
        compile_safely(key, f"{CONFIG}: {field}[{_short(key)}]", KEY)
    return list(content.items())


def _modules(raw: dict[str, Any], field: str, *, required: bool = False) -> tuple[str, ...] | str:
    value = raw.get(field) or ()
    if required and not value:
        _refuse(field, "no layers are named", "Name the layers that the adapter changes, such as ['q_proj', 'v_proj'].")
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(module, str) and module for module in value):
        _refuse(field, "it is neither a list of names nor a regular expression")
    return tuple(sorted(set(value)))


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        _refuse("layers_to_transform", f"{_short(value)} is neither a layer number nor a list of them")
    return frozenset(numbers)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
