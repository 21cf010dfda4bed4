"""The baseline of the merging and evaluating parts: transformers and PEFT, adapter by adapter, in batches of 32.

    python -m loadtest.bench.tuning.generate_by_hand '{"model": ..., "adapters": [FOLDER or "", ...], "rows": [FILE, ...], ...}'

Each adapter answers its own rows greedily. Prints {"seconds": ..., "tokens": [[ids], ...]}; loading is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_BATCH = 32


def main() -> None:
    """Load, generate, print."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"])
    names = [f"adapter-{number}" if folder else "" for number, folder in enumerate(asked["adapters"])]
    for name, folder in zip(names, asked["adapters"], strict=True):
        if name and not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        elif name:
            model.load_adapter(folder, adapter_name=name)
    model.eval()
    tokens: list[list[int]] = []
    started = time.monotonic()
    with torch.inference_mode():
        for name, rows in zip(names, asked["rows"], strict=True):
            if name:
                model.set_adapter(name)
            tokens += generate(model, tokenizer, Path(rows), asked["count"], asked["max_tokens"])
    sys.stdout.write(json.dumps({"seconds": time.monotonic() - started, "tokens": tokens}) + "\n")


def generate(model: Any, tokenizer: Any, rows: Path, count: int, max_tokens: int) -> list[list[int]]:
    """The answers' tokens to the first rows of a file, up to the end token."""
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()[:count]]
    found = []
    for start in range(0, len(prompts), _BATCH):
        batch = tokenizer(prompts[start : start + _BATCH], return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        for answer in out[:, batch["input_ids"].shape[1] :].tolist():
            end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else len(answer)
            found.append(answer[:end])
    return found


if __name__ == "__main__":
    main()
