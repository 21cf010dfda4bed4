"""The baseline of the training part: transformers' Trainer and PEFT as their documentation shows them, on the same rows.

    python -m loadtest.bench.tuning.plain_trainer '{"model": ..., "rows": ..., "rank": 8, "targets": [...], "steps": 12, ...}'

Rows are padded to the longest of the batch, and the model computes loss and logits itself. Prints {"tokens_per_second": ...},
counted without padding.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Train, and print the speed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    asked = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    rows = [encode(json.loads(line), tokenizer) for line in Path(asked["rows"]).read_text().splitlines()]
    torch.manual_seed(asked["seed"])
    base = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    config = LoraConfig(
        r=asked["rank"], lora_alpha=2 * asked["rank"], target_modules=asked["targets"], task_type="CAUSAL_LM"
    )
    seen = 0

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        nonlocal seen
        seen += sum(len(row["input_ids"]) for row in batch)
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": tokenizer.eos_token_id, "labels": -100, "attention_mask": 0}
        return {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])
            for name, value in fill.items()
        }

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=asked["steps"], per_device_train_batch_size=8, learning_rate=1e-3, seed=asked["seed"],
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model=get_peft_model(base, config), args=settings, train_dataset=rows, data_collator=collate)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    sys.stdout.write(json.dumps({"tokens_per_second": seen / seconds}) + "\n")


def encode(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """A row with labels on its completion."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    ids = prompt + completion
    return {"input_ids": ids, "labels": [-100] * len(prompt) + completion, "attention_mask": [1] * len(ids)}


if __name__ == "__main__":
    main()
