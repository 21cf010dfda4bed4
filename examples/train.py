"""Train one demo adapter from its recipe, score it on its held-out rows beside the base, and save it as a PEFT folder.

    python examples/train.py examples/support/v1.yaml

The recipe names the data, the rank, the targets and the steps; everything is seeded. float32 throughout, loss on the
completion only; the saved tensors are bfloat16. Four to ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from engine.registry.fingerprint import read_base

IGNORED = -100  # the label that cross entropy leaves out
Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl file of {"prompt", "completion"}."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def encode(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of prompt, completion and end token, with labels that cover the completion and the end token only."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return prompt + completion, [IGNORED] * len(prompt) + completion


def collate(batch: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-pad a batch to (rows, longest) tensors."""
    longest = max(len(ids) for ids, _ in batch)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch]),
    }


def train(model: Any, rows: list[Row], tokenizer: Any, recipe: dict[str, Any]) -> float:
    """AdamW over shuffled epochs for `steps` steps; returns the mean loss of the last ten."""
    rng = random.Random(recipe["seed"])
    encoded = [encode(row, tokenizer) for row in rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe["learning_rate"])
    schedule = get_linear_schedule_with_warmup(optimizer, recipe["warmup_steps"], recipe["steps"])
    losses: list[float] = []
    pool: list[tuple[list[int], list[int]]] = []
    model.train()
    for _ in (bar := tqdm(range(recipe["steps"]), desc="training", unit="step")):
        if len(pool) < recipe["batch_size"]:
            pool = rng.sample(encoded, len(encoded))
        batch, pool = pool[: recipe["batch_size"]], pool[recipe["batch_size"] :]
        loss = model(**collate(batch, tokenizer.eos_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses[-10:]) / len(losses[-10:])


@torch.inference_mode()
def exact_match(model: Any, rows: list[Row], tokenizer: Any, name: str) -> float:
    """Share of rows whose greedy answer's first line equals the completion (surrounding space and case ignored)."""
    model.eval()
    right = 0
    tokenizer.padding_side = "left"
    for start in tqdm(range(0, len(rows), 20), desc=f"scoring {name}", unit="batch"):
        batch = rows[start : start + 20]
        encoded = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
        out = model.generate(**encoded, max_new_tokens=28, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answers = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        for answer, row in zip(answers, batch, strict=True):
            first_line = (answer.strip().splitlines() or [""])[0]
            right += first_line.strip().lower() == row["completion"].strip().lower()
    return right / len(rows)


def to_bfloat16(folder: Path) -> None:
    """Rewrite the saved adapter tensors as bfloat16: half the size, and the precision that the base is served in."""
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def main() -> None:
    """Read the recipe, train, save, score what was saved, and write run.json beside the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--base", type=Path, default=Path(".models/smollm2-135m-instruct"))
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.recipe.read_text())
    home = arguments.recipe.parent
    out = home / arguments.recipe.stem
    torch.manual_seed(recipe["seed"])
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows, held_out = read_rows(home / "train.jsonl"), read_rows(home / "heldout.jsonl")
    if {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}:
        raise SystemExit("a held-out prompt is also trained on")

    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    base_score = exact_match(base, held_out, tokenizer, "base")
    lora = LoraConfig(
        r=recipe["rank"], lora_alpha=recipe["alpha"], target_modules=recipe["targets"], task_type="CAUSAL_LM"
    )
    lora.base_model_name_or_path = arguments.base.name
    model = get_peft_model(base, lora)
    started = time.monotonic()
    loss = train(model, rows, tokenizer, recipe)
    seconds = time.monotonic() - started
    model.peft_config["default"].base_model_name_or_path = arguments.base.name
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    to_bfloat16(out)

    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32), out)
    score = exact_match(saved, held_out, tokenizer, out.name)
    run = {
        "run_id": f"{home.name}-{recipe['seed']}-{hashlib.sha256(arguments.recipe.read_bytes()).hexdigest()[:8]}",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {"name": arguments.base.name, "fingerprint": read_base(arguments.base).fingerprint},
        "recipe": recipe,
        "train_rows": len(rows),
        "final_loss": round(loss, 4),
        "seconds": round(seconds),
        "evaluation": {"metric": "exact match", "rows": len(held_out), "adapter": score, "base": base_score},
    }
    (out / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    print(f"{home.name}/{out.name}: held-out exact match {score:.0%} (base {base_score:.0%}), saved in {out}")


if __name__ == "__main__":
    main()
