"""Comparing two models: what is held of them, and how their answers are weighed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.tuning import merge_check
from engine.tuning.merge_check import likeness, logits_of

pytestmark = pytest.mark.slow


def test_the_comparison_holds_few_logits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of the texts, as many places as there is room for, and of the second model one text at a time."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    texts = [list(range(1, 21)), [7, 8, 9]]
    whole = [model(torch.tensor([ids])).logits[0] for ids in texts]
    monkeypatch.setattr(merge_check, "_PLACES", 8)
    held = [*logits_of(model, texts)]
    assert [len(one) for one in held] == [4, 3]
    monkeypatch.setattr(merge_check, "_PLACES_OF_ONE", 2)
    assert [len(one) for one in logits_of(model, texts)] == [2, 2]
    assert all(torch.allclose(one, all_[-4:], atol=1e-5) for one, all_ in zip(held, whole, strict=True))
    alive: list[weakref.ref[torch.Tensor]] = []

    def found() -> Iterator[torch.Tensor]:
        for one in held * 2:
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1  # the one before, until it is replaced
            other = one + 0.1 * torch.randn_like(one)
            alive.append(weakref.ref(other))
            yield other
            del other

    assert likeness(held * 2, found()).kl > 0


def test_likeness_weighs_every_place_alike(tmp_path: Path) -> None:
    """By hand: over two texts of three places and one, as over one of four."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    split = likeness([a[:3], a[3:]], [b[:3], b[3:]])
    p, q = a.softmax(-1), b.softmax(-1)
    assert split.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert split.agreement == float((a.argmax(-1) == b.argmax(-1)).float().mean())
    assert split.largest == float((a - b).abs().max())
