"""vLLM's CPU platform with our LoRA kernels."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class LoraplexCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """Differs in the wrapper that it names and in nothing else."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The qualified name of the class that vLLM hands every LoRA computation to."""
        return "engine.vllm_plugin.wrapper.PunicaWrapperLoraplex"
