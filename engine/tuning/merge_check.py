"""Whether a merged model answers as base and adapter do, and what merging into 4 bits would have cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from engine.errors import MergeRefused
from engine.tuning.base_model import load_base, takes
from engine.tuning.deltas import Deltas
from engine.tuning.judging import prompts
from engine.tuning.merge import Change, four_bits, is_linear
from engine.tuning.recipe import Quantization
from engine.tuning.suite import Suite

_TEXTS = (
    "The capital of France is", "def fibonacci(n):", "Dear Sir or Madam,", "1, 2, 3, 4,", "SELECT name FROM",
    "Once upon a time there was", "In no event shall the Supplier", "Please cancel my subscription",
)  # fmt: skip
_COMPARED = 32  # questions of a suite
_PLACES_OF_ONE = 256  # of a text: comparing two takes eight times what its logits do
_PLACES = 2048  # of all texts together whose logits are held: 1.2 GB of them at a vocabulary of 150,000
_LEAST_AGREEMENT = {"float32": 0.999, "bfloat16": 0.95, "float16": 0.98}
_MOST_KL = {"float32": 1e-6, "bfloat16": 0.02, "float16": 0.005}


@dataclass(frozen=True)
class Likeness:
    """How alike two models are over some texts: largest difference of a logit, mean KL divergence, same likeliest token."""

    largest: float
    kl: float
    agreement: float


def texts_of(suite: Suite | None, tokenizer: Any) -> list[list[int]]:
    """Token ids to compare on: a suite's first questions, with their right answers if it says them, else general beginnings."""
    if suite:
        first = replace(suite, cases=suite.cases[:_COMPARED])
        answers = [tokenizer(case.wanted.get("exact", ""), add_special_tokens=False) for case in first.cases]
        asked = prompts(first, tokenizer)
        return [[*ids, *answer["input_ids"]] for ids, answer in zip(asked, answers, strict=True)]
    return [list(tokenizer(text)["input_ids"]) for text in _TEXTS]


def reference(base: Path, adapter: Path, precision: str) -> Any:
    """Base and adapter, unmerged, as the adapter was trained: float32, or over the base in 4 bits."""
    kind, _, double = precision.partition("-")
    quantization = Quantization(type=kind, double=bool(double)) if precision != "full" else None
    return PeftModel.from_pretrained(load_base(base, torch.float32, quantization), str(adapter))


@torch.no_grad()
def logits_of(model: Any, texts: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """The logits at the end of each text, (places, vocabulary), one text after the other, so that few are in memory."""
    model.eval()
    most = max(1, min(_PLACES // len(texts), _PLACES_OF_ONE))
    keep = {"logits_to_keep": most} if takes(model, "logits_to_keep") else {}
    for ids in texts:
        yield (
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, **keep).logits[0, -most:].float()
        )


def likeness(wanted: Iterable[torch.Tensor], found: Iterable[torch.Tensor]) -> Likeness:
    """Compare logits text by text; neither side need be in memory as a whole."""
    largest = kl = 0.0
    agreeing = places = 0
    for a, b in zip(wanted, found, strict=True):
        largest = max(largest, float((a - b).abs().max()))
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
        places += len(a)
    return Likeness(largest, 0.0 if kl < 0 else kl / places, agreeing / places)


def check_likeness(found: Likeness, dtype: str) -> None:
    """Raise MergeRefused when a merged model in this precision strays further than rounding explains."""
    if found.kl > _MOST_KL[dtype] or found.agreement < _LEAST_AGREEMENT[dtype] or math.isnan(found.kl):
        problem = (
            f"the merged model does not answer as base and adapter do: KL {found.kl:.3g}, the same likeliest token at "
            f"{found.agreement:.1%} of places"
        )
        raise MergeRefused(problem, fix="Merge with --dtype float32; if that fails too, report it.")


@torch.no_grad()
def in_memory(base: Path, deltas: Deltas, change: Change, others: Change | None) -> Any:
    """A merged model that is not written, for measuring; summed on the CPU, as a merge that is."""
    model = load_base(base, torch.float32)
    for name, module in model.named_modules():
        if name in deltas.modules:
            module.weight.copy_(change(name, module.weight.cpu()))
        elif others and is_linear(f"{name}.weight") and isinstance(module, torch.nn.Linear):
            module.weight.copy_(others(name, module.weight.cpu()))
    return model


@dataclass(frozen=True)
class Erasure:
    """What 4 bits do to an adapter, as means over its layers.

    `change` is its size relative to the weight, `error` that of quantisation, `survives` the cosine of what is left with what
    was meant.
    """

    change: float
    error: float
    survives: float


def erasure(base: Path, deltas: Deltas, precision: str) -> Erasure:
    """Measure it on every layer that the adapter changes."""
    model = load_base(base, torch.float32)
    found = []
    for name in sorted(deltas.modules):
        weight, delta = model.get_submodule(name).weight.detach().cpu(), deltas.of(name)
        rounded = four_bits(weight, precision)
        left = four_bits(rounded + delta, precision) - rounded
        cosine = float((left * delta).sum() / (left.norm() * delta.norm()).clamp(min=1e-12))
        found.append((float(delta.norm() / weight.norm()), float((weight - rounded).norm() / weight.norm()), cosine))
    return Erasure(*(sum(values) / len(found) for values in zip(*found, strict=True)))
