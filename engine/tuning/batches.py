"""From examples to tensors, with the output layer computed only where something is learnt.

A label's token is predicted at the position before it. `logits_to_keep` tells the model which positions need logits at all:
with short answers and a large vocabulary that saves about a fifth of a step (`make bench ARGS=tuning`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.tuning.encoding import IGNORED, Example

Batch = dict[str, torch.Tensor]


def packed(examples: Sequence[Example]) -> Batch:
    """All rows end to end in one, (1, tokens), positions starting anew with each: transformers then keeps them apart.

    The same rows make the same step as padded ones; only the padding is not computed.
    """
    ids = torch.tensor([[token for example in examples for token in example.ids]])
    positions = torch.tensor([[at for example in examples for at in range(len(example.ids))]])
    labels = torch.tensor([label for example in examples for label in _shifted(example.labels)])
    keep = (labels != IGNORED).nonzero().squeeze(1)
    return {"input_ids": ids, "position_ids": positions, "logits_to_keep": keep, "labels": labels[keep].unsqueeze(0)}


def padded(examples: Sequence[Example], pad: int) -> Batch:
    """Rows of one length, (rows, longest), padded on the left so that the answers lie together at the end."""
    longest = max(len(example.ids) for example in examples)
    fill = [longest - len(example.ids) for example in examples]
    rows = list(zip(examples, fill, strict=True))
    mask = torch.tensor([[0] * gap + [1] * len(example.ids) for example, gap in rows])
    labels = torch.tensor([[IGNORED] * gap + _shifted(example.labels) for example, gap in rows])
    keep = (labels != IGNORED).any(0).nonzero().squeeze(1)
    return {
        "input_ids": torch.tensor([[pad] * gap + example.ids for example, gap in rows]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": keep,
        "labels": labels[:, keep],
    }


def _shifted(labels: list[int]) -> list[int]:
    """At each position the label of the next one."""
    return [*labels[1:], IGNORED]
