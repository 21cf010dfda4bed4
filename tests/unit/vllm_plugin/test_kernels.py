"""The compiled LoRA kernels against plain arithmetic, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine.vllm_plugin.kernels import Layer, Library, Rows, load

SLOTS = 5
ROWS = 67  # more than two blocks of a slot
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Q_K_V = (576, 192, 192)


@pytest.fixture(scope="module")
def library() -> Library:
    """The library that the installation built."""
    found = load()
    if found is None:
        pytest.fail("engine/vllm_plugin/_lora is missing: run `make setup` with a C++ compiler")
    return found


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Case:
    """A layer with random adapters in its slots, and a batch with random rows."""

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        size: int = 576,
        outs: tuple[int, ...] = Q_K_V,
        rank: int = 16,
        padded: int = 16,
    ) -> None:
        make = torch.Generator().manual_seed(rank * size)
        self.a = [torch.zeros(SLOTS, 1, padded, size, dtype=dtype) for _ in outs]
        self.b = [torch.zeros(SLOTS, 1, out, padded, dtype=dtype) for out in outs]
        for a, b in zip(self.a, self.b, strict=True):
            a[:, :, :rank] = torch.randn(SLOTS, 1, rank, size, generator=make) / math.sqrt(size)
            b[..., :rank] = torch.randn(SLOTS, 1, b.shape[2], rank, generator=make) / math.sqrt(rank)
        self.x = torch.randn(ROWS, size, generator=make).to(dtype)
        self.y = torch.randn(ROWS, sum(outs), generator=make).to(dtype)
        self.slots = np.random.default_rng(rank).integers(-1, SLOTS - 1, ROWS).astype(np.int32)
        self.layer = Layer(self.a, self.b)

    def run(self, library: Library, only: slice = slice(None)) -> torch.Tensor:
        """What the kernel makes of y, for some of the rows."""
        y = self.y[only].clone()
        assert self.layer.takes(self.x[only], y)
        library.linear(self.layer, Rows(self.slots[only]), self.x[only], y)
        return y

    def expected(self) -> torch.Tensor:
        """The same by torch, row by row, in float32."""
        y = self.y.float().clone()
        for row, slot in enumerate(self.slots.tolist()):
            if slot < 0:
                continue
            parts = []
            for a, b in zip(self.a, self.b, strict=True):
                between = (self.x[row].float() @ a[slot, 0].float().T).to(a.dtype).float()
                parts.append(between @ b[slot, 0].float().T)
            y[row] += torch.cat(parts)
        return y


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("size", "outs"), [(576, Q_K_V), (576, (1536, 1536)), (1536, (576,)), (50, (37, 20))])
@pytest.mark.parametrize(("rank", "padded"), [(16, 16), (8, 16), (12, 64), (1, 1), (3, 8)])
def test_right(library: Library, dtype: torch.dtype, size: int, outs: tuple[int, ...], rank: int, padded: int) -> None:
    """Every row gets its own adapter's update, in every type, size and rank; the others are not touched."""
    case = Case(dtype, size, outs, rank, padded)
    y, expected = case.run(library), case.expected()
    assert (y.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    base = torch.from_numpy(case.slots < 0)
    assert torch.equal(y[base], case.y[base])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [16, 12, 3])
def test_a_row_does_not_depend_on_its_neighbours(library: Library, dtype: torch.dtype, rank: int) -> None:
    """To the last bit: alone, in twos, in fives, or all together."""
    case = Case(dtype, rank=rank)
    together = case.run(library)
    for size in (1, 2, 5, 40):
        apart = [case.run(library, slice(first, first + size)) for first in range(0, ROWS, size)]
        assert torch.equal(torch.cat(apart), together)


def test_another_slots_poison_stays_there(library: Library) -> None:
    """NaN in one adapter changes no row of another, nor of the base."""
    case = Case()
    clean = case.run(library)
    for weights in (*case.a, *case.b):
        weights[2] = float("nan")
        weights[SLOTS - 1] = float("nan")  # in no row's slot
    poisoned = case.run(library)
    others = torch.from_numpy(case.slots != 2)
    assert torch.equal(poisoned[others], clean[others])
    assert poisoned[~others].isnan().all()


def test_a_slot_that_is_replaced(library: Library) -> None:
    """New weights in a slot count from the next call on, also where the slot was empty or of another rank."""
    case = Case(rank=4)
    case.run(library)
    for a, b in zip(case.a, case.b, strict=True):
        a[1] = 0  # as vLLM resets a slot
        b[1] = 0
    assert torch.equal(case.run(library)[case.slots == 1], case.y[case.slots == 1])
    for a, b in zip(case.a, case.b, strict=True):
        a[1] = torch.randn_like(a[1]) / 24
        b[1] = torch.randn_like(b[1]) / 4
    y, expected = case.run(library), case.expected()
    assert (y.float() - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert not torch.equal(y[case.slots == 1], case.y[case.slots == 1])


def test_an_untouched_layer_is_left_alone_until_it_is_touched(library: Library) -> None:
    """A layer that no adapter of the batch changes is remembered as such, but not beyond the next change of a slot."""
    case = Case()
    kept = [weights.clone() for weights in case.a]
    for weights in case.a:
        weights.zero_()
    rows, y = Rows(case.slots), case.y.clone()
    library.linear(case.layer, rows, case.x, y)
    assert torch.equal(y, case.y)
    assert case.layer.idle_for is rows
    for weights, before in zip(case.a, kept, strict=True):
        weights.copy_(before)
    library.linear(case.layer, rows, case.x, y)
    assert case.layer.idle_for is None
    assert not torch.equal(y, case.y)


def test_views(library: Library) -> None:
    """Rows that lie apart in memory are found by their stride."""
    case = Case()
    expected = case.run(library)
    x = torch.zeros(ROWS, 2 * 576, dtype=torch.bfloat16)
    y = torch.zeros(ROWS, sum(Q_K_V) + 16, dtype=torch.bfloat16)
    x[:, 576:], y[:, : sum(Q_K_V)] = case.x, case.y
    library.linear(case.layer, Rows(case.slots), x[:, 576:], y)
    assert torch.equal(y[:, : sum(Q_K_V)], expected)
    assert not y[:, sum(Q_K_V) :].any()


def test_what_is_left_to_torch() -> None:
    """Types that differ, and outputs that are too narrow, are not for the kernels."""
    case = Case()
    assert not case.layer.takes(case.x.float(), case.y)
    assert not case.layer.takes(case.x, case.y[:, 1:])
    assert not case.layer.takes(case.x.T, case.y)


@pytest.mark.parametrize("count", [0, 1, 33, 200])
def test_every_row_is_in_one_group(count: int) -> None:
    """Rows with an adapter are grouped by slot, each once; those without are in none."""
    slots = np.random.default_rng(count).integers(-1, 4, count).astype(np.int32)
    rows = Rows(slots)
    grouped = {int(row): slot for slot, members in rows.groups for row in members}
    assert grouped == {row: slot for row, slot in enumerate(slots.tolist()) if slot >= 0}
    assert sum(len(members) for _, members in rows.groups) == len(grouped)
