"""RMS normalisation for CPUs by vLLM's own C++ kernels.

vLLM 0.32 builds them for CPUs (csrc/cpu/layernorm.cpp) and then offers them to GPUs alone (vllm/kernels/vllm_c.py), so a CPU
takes six to nine small torch operators for each of a model's normalisations. Importing this file registers them under the name
`PROVIDER`; the platform puts that first (platform.py).
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

current_platform.import_kernels()

PROVIDER = "loraplex"
_VECTOR = 16  # elements: the kernels take whole vectors alone
# Without instructions for it, vLLM's C++ (csrc/cpu/cpu_types_x86.hpp) cuts bfloat16 off instead of rounding it.
ROUNDS = platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()


def takes(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    """Whether the kernels compute this, and well: one type, whole rows without gaps, the mean taken over all of a row."""
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and (ROUNDS or x.dtype != torch.bfloat16)
        and x.shape[-1] % _VECTOR == 0
        and x.is_contiguous()
    )


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return takes(x, weight, variance_size)


def _takes_both(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return takes(x, weight, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)  # type: ignore[untyped-decorator]
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """`x` [..., size] over the root of its mean square, times `weight` [size]."""
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_both, inplace=True)  # type: ignore[untyped-decorator]
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Add `x` to `x_residual`, both [..., size], and normalise the sum into `x`."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
