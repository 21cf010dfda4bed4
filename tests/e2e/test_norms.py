"""Normalisation on CPUs: vLLM's C++ kernels, where they fit, agree with vLLM's own arithmetic."""

from __future__ import annotations

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("our kernels are for CPUs", allow_module_level=True)
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as the engine does on a CPU: nothing is compiled while vLLM is imported

from vllm import ir  # noqa: E402

from engine.vllm_plugin import norms  # noqa: E402

pytestmark = pytest.mark.model

SIZE, EPSILON = 576, 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
ours = pytest.mark.parametrize("dtype", TOLERANCE)


def case(dtype: Any, *shape: int) -> tuple[Any, Any, Any]:
    """Hidden states, a residual and a weight."""
    torch.manual_seed(len(shape))
    x, residual = torch.randn(*shape, SIZE), torch.randn(*shape, SIZE) * 3
    return x.to(dtype), residual.to(dtype), (torch.rand(SIZE) + 0.5).to(dtype)


def computed(name: str, *args: Any, by: str = norms.PROVIDER) -> Any:
    """What our registration of an operator of vLLM computes; by="native": what vLLM does on a CPU without us."""
    return getattr(ir.ops, name).impls[by].impl_fn(*args)


@ours
@pytest.mark.parametrize("shape", [(1,), (16,), (513,), (3, 7)])
def test_same_as_vllm(dtype: Any, shape: tuple[int, ...]) -> None:
    """Both kernels give vLLM's numbers, for one row and for many."""
    x, residual, weight = case(dtype, *shape)
    if not norms.takes(x, weight, None):
        pytest.skip("left to vLLM on this CPU")
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    expected, summed = computed("fused_add_rms_norm", x.clone(), residual.clone(), weight, EPSILON, by="native")
    normalised = computed("rms_norm", x, weight, EPSILON)
    assert torch.allclose(normalised, computed("rms_norm", x, weight, EPSILON, by="native"), **near)
    added, carried = computed("fused_add_rms_norm", x, residual, weight, EPSILON)
    assert torch.allclose(added, expected, **near)
    assert torch.equal(carried, summed)


@ours
def test_a_row_is_the_same_in_any_batch(dtype: Any) -> None:
    """A row's result does not depend on its neighbours: the isolation proof rests on that."""
    x, _, weight = case(dtype, 33)
    together = computed("rms_norm", x, weight, EPSILON)
    for row in range(33):
        assert torch.equal(computed("rms_norm", x[row : row + 1], weight, EPSILON)[0], together[row])


def test_what_the_kernels_would_get_wrong() -> None:
    """Gaps between rows, other types, part of a row, odd sizes and no weight are left to vLLM; bfloat16 where it is cut off."""
    x, _, weight = case(torch.bfloat16, 4)
    assert norms.takes(x, weight, None) == norms.ROUNDS
    x, _, weight = case(torch.float16, 4)
    assert norms.takes(x, weight, None)
    assert not norms.takes(x[:, ::2], weight[::2], None)
    assert not norms.takes(x, weight.float(), None)
    assert not norms.takes(x, weight, SIZE // 2)
    assert not norms.takes(x[:, :575].contiguous(), weight[:575], None)
    assert not norms.takes(x, None, None)
