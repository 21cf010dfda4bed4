"""Scores on held-out rows without generating: one forward pass tells what greedy decoding would write.

Greedy decoding writes the completion exactly if, and only if, each of its tokens is the likeliest one after those before it. So
"exact" needs no generation, and can be looked at during training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.intervals import wilson
from engine.tuning.base_model import losses
from engine.tuning.batches import padded
from engine.tuning.encoding import IGNORED, Example, scored_together


@dataclass(frozen=True)
class Score:
    """Of `rows`: how many greedy answers are `exact`, end token included; how many only `begin` rightly; mean loss a token.

    An answer that was cut to the context has no end, so it is never exact.
    """

    rows: int
    exact: int
    begin: int
    loss: float

    @property
    def accuracy(self) -> float:
        """The share of exact answers."""
        return self.exact / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Where that share lies with 95 % confidence."""
        return wilson(self.exact, self.rows)


def score(model: Any, examples: Sequence[Example], pad: int, end: int) -> Score:
    """Score a model on examples whose answers end in the token `end`."""
    was_training = model.training
    model.eval()
    exact = begin = tokens = 0
    total = 0.0
    with torch.no_grad():
        for rows in scored_together(examples):
            batch = padded(rows, pad)
            logits, loss = losses(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
            labels = batch["labels"]
            right = (logits.argmax(-1).to(labels.device) == labels) | (labels == IGNORED)
            whole = torch.tensor([not row.cut for row in rows])
            exact += int((right.all(1) & whole).sum())
            begin += int((right | (labels == end)).all(1).sum())
            tokens += int((labels != IGNORED).sum())
            total += float(loss)
    model.train(was_training)
    return Score(len(examples), exact, begin, total / tokens if math.isfinite(total) else math.nan)
