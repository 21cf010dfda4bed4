"""vLLM's CPU platform with our LoRA kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig


class LoraplexCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """Differs, for engines with LoRA, in two things: who adds the adapters' part, and who normalises."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The qualified name of the class that vLLM hands every LoRA computation to."""
        return "engine.vllm_plugin.wrapper.PunicaWrapperLoraplex"

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Register vLLM's kernels, and then ours."""
        super().import_ir_kernels()
        import engine.vllm_plugin.norms  # noqa: F401

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        """Which kernels to try first for vLLM's own operators; what the user asked for comes before."""
        from vllm.config.kernel import IrOpPriorityConfig

        from engine.vllm_plugin.norms import PROVIDER

        if vllm_config.lora_config is None:
            return super().get_default_ir_op_priority(vllm_config)
        norms = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=norms, fused_add_rms_norm=norms)
