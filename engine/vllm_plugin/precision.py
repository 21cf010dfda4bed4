"""The precision to compute in, where that was left open."""

from __future__ import annotations


def precision(asked: str, *, on_cpu: bool) -> str:
    """What is asked, or for "auto": the base's own ("auto" to vLLM), but float32 on a CPU without instructions for 16 bits.

    Without them (x86 before AVX-512) oneDNN has no kernels for bfloat16, and torch multiplies matrices element by element: a
    batch takes seventy times as long as in float32. Weights of 16 bits are exact in float32.
    """
    if asked != "auto" or not on_cpu:
        return asked
    import torch

    return "auto" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
