"""What a run trains and needs, from the base's shapes alone: nothing is loaded."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidRecipe
from engine.registry.fingerprint import check_base
from engine.tuning.recipe import Recipe

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)\.weight$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_RUNTIME_BYTES = 450_000_000  # Python, torch, transformers and PEFT, measured without a model
_ADAM_BYTES = 8  # two float32 moments a parameter (Kingma and Ba, 2015)
_LAYER_BYTES = (
    34  # of activations a token and hidden unit in 16 bits, attention scores aside (Korthikanti et al., 2022)
)


@dataclass(frozen=True)
class Shape:
    """The base in numbers: (out, in) of each linear layer inside the decoder's layers, and what else counts.

    `transposed` has the last names of layers that are stored as (in, out), as GPT-2's Conv1D are.
    """

    linear: dict[str, tuple[int, int]]
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    transposed: frozenset[str] = frozenset()


def read_shape(folder: Path) -> Shape:
    """Read config.json and the weights' headers; raises BaseModelNotFound or BaseModelIncomplete."""
    config, tensors = check_base(folder)
    linear: dict[str, tuple[int, int]] = {}
    transposed = set()
    for name, tensor in tensors.items():
        if _LAYER.search(name) and len(tensor.shape) == 2:
            layer = name.removesuffix(".weight")
            linear[layer] = (tensor.shape[0], tensor.shape[1])
            bias = tensors.get(f"{layer}.bias")
            if bias and bias.shape == tensor.shape[1:] != tensor.shape[:1]:  # a bias is as long as the outputs
                transposed.add(layer.rpartition(".")[2])
    text = config.get("text_config") or config
    return Shape(
        linear=linear,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        layers=int(text.get("num_hidden_layers") or 1),
        hidden=int(text.get("hidden_size") or 1),
        vocabulary=int(text.get("vocab_size") or 1),
        context=int(text.get("max_position_embeddings") or 0),
        transposed=frozenset(transposed),
    )


def target_names(recipe: Recipe, shape: Shape) -> list[str]:
    """The last names of the layers that get an adapter.

    Raises InvalidRecipe listing those that exist, or when an adapter of those that are meant would not be served.
    """
    existing = sorted({name.rpartition(".")[2] for name in shape.linear})
    found, problem = existing, "it names none of the base's layers"
    match recipe.lora.targets:
        case "all-linear":
            pass
        case "attention":
            found = sorted({name.rpartition(".")[2] for name in shape.linear if _ATTENTION.search(name)})
        case names:
            found = list(names)
            if unknown := [name for name in names if name not in existing]:
                found, problem = [], f"the base has no layer {', '.join(map(repr, unknown))}"
    if not found:
        raise InvalidRecipe("lora.targets", problem, fix=f"It has: {', '.join(existing)}.")
    if unserved := sorted(shape.transposed.intersection(found)):
        problem = (
            f"its layers {', '.join(unserved)} are stored transposed, as GPT-2's are, and no adapter of them is served"
        )
        raise InvalidRecipe(
            "base", problem, fix="Train on a base with ordinary linear layers, such as a Llama or a Qwen."
        )
    return found


@dataclass(frozen=True)
class Estimate:
    """Parameters that train, of all; and bytes at the run's peak, part by part."""

    trainable: int
    parameters: int
    weights: int
    adapter: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.adapter + self.activations + self.runtime

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: the adapter and its two moments, in float32."""
        return self.trainable * (4 + _ADAM_BYTES)


@dataclass(frozen=True)
class Largest:
    """The largest batch of a run: its tokens, and how many of them have a label."""

    tokens: int
    learnt: int


def estimate(recipe: Recipe, shape: Shape, width: int, trained: Largest, scored: Largest) -> Estimate:
    """Estimate a run whose largest batches are these, to learn from and of held-out rows; `width` is bytes a weight."""
    targets = set(target_names(recipe, shape))
    trainable = sum(
        recipe.lora.rank * (out + into)
        for name, (out, into) in shape.linear.items()
        if name.rpartition(".")[2] in targets
    )
    linear = sum(out * into for out, into in shape.linear.values())
    weights = shape.parameters * width
    if recipe.method == "qlora":
        weights = int(linear * _quantized_bytes(recipe) + (shape.parameters - linear) * width)
    one_layer = shape.hidden * _LAYER_BYTES * width // 2
    per_token = shape.layers * one_layer
    if checkpointing(recipe):  # the input of each layer, and one layer in full
        per_token = shape.layers * shape.hidden * width + one_layer
    per_label = shape.vocabulary * 4 * 3
    return Estimate(
        trainable=trainable,
        parameters=shape.parameters,
        weights=weights,
        adapter=trainable * (4 + 4 + _ADAM_BYTES),
        activations=max(
            trained.tokens * per_token + trained.learnt * per_label,
            scored.tokens * one_layer + scored.learnt * per_label,
        ),
        runtime=_RUNTIME_BYTES,
    )


def checkpointing(recipe: Recipe) -> bool:
    """Whether activations are computed twice instead of kept: where memory is short, which on a CPU it rarely is."""
    if recipe.train.gradient_checkpointing == "auto":
        return recipe.method == "qlora" and has_gpu()
    return recipe.train.gradient_checkpointing


def _quantized_bytes(recipe: Recipe) -> float:
    """Half a byte a weight, and a scale for every 64: 4 bytes, or 1 with double quantisation (QLoRA, section 3)."""
    return 0.5 + (1 if recipe.quantization.double else 4) / 64


def memory_available() -> int:
    """Bytes that a new process may take without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else 0


def weight_width(recipe: Recipe, *, gpu: bool) -> int:
    """Bytes of a weight while training: 4 on a CPU (bfloat16 is slower there), 2 on a GPU, or as the recipe says."""
    if recipe.train.precision == "auto":
        return 2 if gpu else 4
    return 4 if recipe.train.precision == "fp32" else 2


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return Path("/proc/driver/nvidia/version").exists()
