"""A base model of a few thousand random parameters with a byte tokenizer, and recipes that train on it in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A token for each byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_base(folder: Path, seed: int = 0, layers: int = 2, **changes: Any) -> Path:
    """A llama of two layers, 16 wide."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "eos_token_id": 256,
        "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """Rows of prompt and completion."""
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


def questions(start: int, stop: int) -> list[tuple[str, str]]:
    """A task that even a tiny model learns: the answer is always the same."""
    return [(f"q{number}:", " yes") for number in range(start, stop)]


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    """A recipe for 8 steps over 32 rows; `sections` are merged into its own."""
    write_rows(folder / "train.jsonl", questions(0, 32))
    write_rows(folder / "heldout.jsonl", questions(100, 108))
    content: dict[str, Any] = {
        "name": "tiny",
        "base": str(base),
        "data": {"train": "train.jsonl", "held_out": "heldout.jsonl", "max_length": 64},
        "lora": {"rank": 4},
        "train": {"steps": 8, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1},
    }
    for name, value in sections.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
