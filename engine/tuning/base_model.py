"""Loading a base to train on, in full precision or 4 bits, and proving that its adapter learns."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from engine.errors import TrainingFailed
from engine.tuning.batches import Batch
from engine.tuning.recipe import Quantization, Recipe

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(wanted: str) -> torch.dtype:
    """The dtype to compute in. A CPU without matrix units for bfloat16 (AMX) is about twice as fast in float32."""
    if wanted != "auto":
        return _PRECISIONS[wanted]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, which must know an end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise TrainingFailed("the base's tokenizer has no end token", fix="Set eos_token in its tokenizer_config.json.")
    return tokenizer


def pad_token(tokenizer: Any) -> int:
    """What rows are filled up with: the end token where there is none for it; masked, so it changes nothing."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def load_base(folder: Path, dtype: torch.dtype, quantization: Quantization | None = None) -> Any:
    """Load the base for training or scoring; with `quantization` its linear layers are held in 4 bits."""
    logging.disable_progress_bar()  # the command has one of its own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    keep_gradients(model)
    model.config.use_cache = False
    return model


def keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking weights for inference.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a 4-bit layer in its first forward pass without gradients and never
    undoes it: every later training step is then without gradients, silently, and a merge reads garbage.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attach(base: Any, recipe: Recipe, targets: list[str], *, checkpointing: bool) -> PeftModel:
    """Put a fresh adapter on the base; only it will train."""
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.scaled_by,
        lora_dropout=recipe.lora.dropout,
        target_modules=targets,
        use_rslora=recipe.lora.rslora,
        task_type="CAUSAL_LM",
    )
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # Adam's steps are too small for 16 bits
    return model


def check_gradients(model: Any, loss: torch.Tensor) -> None:
    """Backpropagate once and look whether the first layer's adapter learns; raises TrainingFailed when it does not.

    With B all zeros A has no gradient yet, so it is B that must have one.
    """
    loss.backward()
    first = next(p for name, p in model.named_parameters() if "lora_B" in name)
    learns = first.grad is not None and bool(torch.isfinite(first.grad).all()) and float(first.grad.abs().sum()) > 0
    model.zero_grad()
    if not learns:
        raise TrainingFailed(
            "no gradient reaches the first layer's adapter, so it would never learn",
            fix="A library on the way drops gradients (4-bit layers on some CPUs do): use method: lora, or another version.",
        )


def weight_bytes(model: Any) -> int:
    """Bytes that the base's weights take in memory, the adapter's left out."""
    weights = [p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" not in name]
    return int(sum(weights)) + sum(state_bytes(module) for module in model.modules())


def state_bytes(module: Any) -> int:
    """Bytes of a 4-bit layer's scales, which are no parameters."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return 0
    parts = [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
    return sum(int(part.numel() * part.element_size()) for part in parts)


def losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, kept positions, vocabulary) and the summed cross entropy of the labels, in float32."""
    inputs = dict(batch)
    labels, keep = inputs.pop("labels"), inputs.pop("logits_to_keep")
    if takes(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
    else:
        logits = model(**inputs, use_cache=False).logits[:, keep].float()
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def takes(model: Any, argument: str) -> bool:
    """Whether the base's forward pass has such an argument."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(base.forward).parameters
