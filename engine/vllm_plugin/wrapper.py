"""What vLLM calls for every LoRA computation: which rows have which adapter, then the kernels.

A row without an adapter is in no group, so no kernel ever touches it. vLLM's names are kept: `x` are a layer's inputs
[rows, in], `y` its outputs [rows, out], changed in place; stacked A is [slots, 1, rank, in], stacked B [slots, 1, out, rank].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from engine.vllm_plugin import kernels
from engine.vllm_plugin.kernels import Layer, Rows

Stack = tuple[torch.Tensor, ...]


class PunicaWrapperLoraplex(PunicaWrapperCPU):  # type: ignore[misc]
    """One for a model's language part; all of its layers share it."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._library = kernels.load()
        self._layers: dict[int, tuple[Any, Layer]] = {}  # by the identity of the stack, which is kept alive beside it
        self._rows = Rows(np.empty(0, np.int32))

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **_: Any
    ) -> None:
        """Learn which row has which adapter; called when the batch or the slots have changed."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._rows = Rows(self.token_lora_indices.numpy())

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stack,
        lora_b_stacked: Stack,
        scale: float,
        output_slices: tuple[int, ...],  # noqa: ARG002 - the widths of B say the same
        **_: Any,
    ) -> None:
        """Add scale · B · A · x to y for a linear layer; its slices (q, k, v) lie side by side in y."""
        if self._rows.groups:
            self._linear(self._layer(lora_a_stacked, lora_b_stacked), self._rows, x, y, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> None:
        """The same for the output layer, whose rows are not the batch's."""
        rows = self._rows_of_logits(x)
        if rows.groups:
            self._linear(self._layer(lora_a_stacked, lora_b_stacked), rows, x, y, scale)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """Add B · x to y, where x [rows, rank] are the looked-up rows of A."""
        self.add_expand(y, (x.float(),), (lora_b_stacked,), (lora_b_stacked.shape[-2],), add_inputs=add_inputs)

    def add_shrink(
        self, y: Sequence[torch.Tensor] | torch.Tensor, x: torch.Tensor, lora_a_stacked: Stack, scale: float, **_: Any
    ) -> None:
        """y[slice] [rows, rank] = scale · A · x: the first half, for adapters that are sharded over processes."""
        x = x.view(-1, x.shape[-1])
        for t, a in zip(y, lora_a_stacked, strict=True):
            for slot, rows in self._rows.indices:
                t[rows] = scale * linear(x[rows].float(), a[slot, 0].float())

    def add_expand(
        self,
        y: torch.Tensor,
        x: Sequence[torch.Tensor] | torch.Tensor,
        lora_b_stacked: Stack,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """y[:, slice] += B · x[slice]: the second half."""
        offset = offset_start
        y = y.view(-1, y.shape[-1])
        for t, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            target = y[:, offset : offset + width]
            if not add_inputs:
                target.zero_()
            for slot, rows in self._rows.indices:
                target[rows] += linear(t[rows].to(b.dtype), b[slot, 0]).to(y.dtype)
            offset += width

    def _layer(self, a: Any, b: Any) -> Layer:
        known = self._layers.get(id(a))
        if known is None:
            layer = Layer((a,), (b,)) if isinstance(a, torch.Tensor) else Layer(a, b)
            known = self._layers[id(a)] = (a, layer)
        return known[1]

    def _linear(self, layer: Layer, rows: Rows, x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
        if layer.idle(rows):
            return
        if x.shape[0] < rows.count or y.shape[0] < rows.count:
            raise RuntimeError(f"{rows.count} rows have adapters assigned, but the layer got {x.shape[0]}")
        if self._library and scale == 1.0 and layer.takes(x, y):
            self._library.linear(layer, rows, x, y)
        else:
            _linear_with_torch(layer, rows, x, y, scale)

    def _rows_of_logits(self, x: torch.Tensor) -> Rows:
        """The adapters of the rows that logits are computed for.

        Usually x holds each request's last row, copied together. For prompt log probabilities vLLM passes a view of
        the batch instead: the rows of one request, which are found by where the view begins.
        """
        sampled = self.sampler_indices
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        if whole and x.shape[0] == sampled.shape[0]:
            return Rows(sampled.numpy())
        first = x.storage_offset() // x.shape[-1]
        return Rows(self.token_lora_indices[first : first + x.shape[0]].numpy())


def _linear_with_torch(layer: Layer, rows: Rows, x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """What the kernels do, for machines without them and for types that they do not take."""
    for slot, indices in rows.indices:
        mine = x[indices].to(layer.dtype)
        offset = 0
        for a, b in layer.slices:
            width = min(b.shape[-2], y.shape[-1] - offset)
            update = linear(linear(mine, a[slot, 0]), b[slot, 0, :width])
            y[indices, offset : offset + width] += (scale * update).to(y.dtype)
            offset += width
