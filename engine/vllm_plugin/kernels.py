"""The compiled LoRA kernels (lora.cpp), called through ctypes, and what they are told about a layer and a batch.

The library is built with the distribution (see pyproject.toml); where there was no compiler, `load` returns None and
the wrapper computes with torch instead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.vllm_plugin import library_path

_BLOCK_ROWS = 32  # most rows of a block; lora.cpp has room for as many
_SMALL_BLOCK = 4  # fewest rows worth a block of their own when there are threads to spare
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_RANK = 512  # lora.cpp has room for as many; vLLM allows no more

Ints = npt.NDArray[np.int32]


class _Slice(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("out", ctypes.c_int32),
        ("y_offset", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("slices", ctypes.c_void_p),
        ("n_slices", ctypes.c_int32),
        ("in_size", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("n_blocks", ctypes.c_int32),
    )


class Rows:
    """The rows of a batch that have an adapter, grouped by slot.

    `slots` gives each row's slot, -1 for none. `groups` lists (slot, its rows); the kernels get them cut into blocks.
    """

    def __init__(self, slots: Ints) -> None:
        self.count = len(slots)
        order = np.argsort(slots, kind="stable").astype(np.int32)
        order = order[np.searchsorted(slots[order], 0) :]  # rows without an adapter sort first
        values, starts = np.unique(slots[order], return_index=True)
        self.groups = list(zip(values.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else []
        self._rows = order
        self._cut(_block_rows(len(order)))

    @functools.cached_property
    def indices(self) -> list[tuple[int, torch.Tensor]]:
        """The groups as torch indexes with them."""
        return [(slot, torch.from_numpy(rows.astype(np.int64))) for slot, rows in self.groups]

    def _cut(self, size: int) -> None:
        starts, slots, position = [], [], 0
        for slot, rows in self.groups:
            for first in range(0, len(rows), size):
                starts.append(position + first)
                slots.append(slot)
            position += len(rows)
        self._starts = np.array([*starts, position], np.int32)
        self._slots = np.array(slots, np.int32)
        self._c = _Batch(self._rows.ctypes.data, self._starts.ctypes.data, self._slots.ctypes.data, len(slots))
        self.address = ctypes.addressof(self._c)


def _block_rows(rows: int) -> int:
    """Rows of a block: many, so that weights are read once for all, but enough blocks for every thread."""
    shared = math.ceil(rows / int(torch.get_num_threads()))
    return min(_BLOCK_ROWS, max(_SMALL_BLOCK, shared))


class Layer:
    """One layer's stacked weights, as vLLM made them: A [slots, 1, rank, in] and B [slots, 1, out, rank] of every slice."""

    def __init__(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        self.slices = list(zip(a, b, strict=True))
        self.dtype = a[0].dtype
        self._ranks = np.full((len(a), a[0].shape[0]), -1, np.int32)
        self._version = -1
        self.idle_for: Rows | None = None  # a batch whose adapters all leave this layer alone
        self._slices = (_Slice * len(a))()
        self._width = 0
        for number, (down, up) in enumerate(self.slices):
            ranks = self._ranks[number].ctypes.data
            self._slices[number] = _Slice(down.data_ptr(), up.data_ptr(), ranks, up.shape[-2], self._width)
            self._width += up.shape[-2]
        rank, in_size = a[0].shape[-2:]
        self._supported = rank <= MAX_RANK and all(
            tensor.is_contiguous() and tensor.dtype == self.dtype and tensor.dtype in _DTYPES for tensor in (*a, *b)
        )
        code = _DTYPES.get(self.dtype, -1)
        self._c = _Layer(ctypes.addressof(self._slices), len(a), in_size, rank, code)
        self.address = ctypes.addressof(self._c)

    def takes(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether the kernels can compute this layer for x and y."""
        return (
            self._supported
            and x.dtype == y.dtype == self.dtype
            and x.stride(-1) == y.stride(-1) == 1
            and x.ndim == y.ndim == 2
            and y.shape[-1] >= self._width
        )

    def idle(self, rows: Rows) -> bool:
        """Whether no adapter of the batch is known to change this layer; until vLLM writes to a slot (always to A, too)."""
        version = self.slices[0][0]._version
        if version != self._version:
            self._version = version
            self._ranks.fill(-1)
            self.idle_for = None
        return self.idle_for is rows


class Library:
    """The functions of lora.cpp."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, stride = ctypes.c_void_p, ctypes.c_int64
        library.lora_linear.argtypes = (pointer, pointer, pointer, stride, pointer, stride)
        library.lora_linear.restype = ctypes.c_int
        self._c: Any = library

    def linear(self, layer: Layer, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add B · A · x [n, in] to y [n, out], each row by its own slot."""
        if layer.idle(rows):
            return
        changed = self._c.lora_linear(layer.address, rows.address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0))
        if not changed:
            layer.idle_for = rows


@functools.cache
def load() -> Library | None:
    """The library, or None where it was not built."""
    path = library_path()
    return Library(path) if path else None
