"""The vLLM engines of the benchmark: equal in all but what is compared."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import safe_open

from engine.config import max_rank_for
from engine.vllm_plugin.precision import precision
from engine.vllm_plugin.threads import on_every_core

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "all-linear": ALL_LINEAR}
CONTENDER = "loadtest.bench.adapters.vllm_contender"  # the module that runs one of these engines as a process
KERNELS = "LORAPLEX_LORA_KERNELS"
_STOP_S = 2.0  # how long vLLM's processes may take to end by themselves
_STEP_TOKENS = 512  # on a CPU; as in engine/runtime/vllm/start.py, where the reason is


@dataclass(frozen=True)
class Lora:
    """Room for adapters: how many at once, up to which rank, on which layers; `kernels` as the plugin's setting."""

    slots: int
    rank: int
    targets: tuple[str, ...] = ATTENTION
    kernels: str = "auto"


@dataclass(frozen=True)
class EngineSpec:
    """One engine. Without `lora` it is the baseline, and differs in nothing else."""

    model: str
    lora: Lora | None = None
    dtype: str = "auto"
    max_running: int = 32
    kv_cache_gib: int = 1
    gpu_share: float = 0.1  # of the GPU's memory, as several engines share it; a CPU has no such share
    prefix_cache: bool = False  # each prompt is computed, or there would be nothing to measure
    every_core: bool = (
        False  # on a CPU: as our server has it, not vLLM's executor, which keeps a core for its scheduler
    )
    profile_dir: str = ""  # where torch.profiler's traces go; "" for an engine that cannot be profiled

    def environment(self) -> dict[str, str]:
        """What vLLM reads when it is imported: no hub, quiet, our kernels or its own."""
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            KERNELS: self.lora.kernels if self.lora else "off",
        }

    def engine_args(self, on_cpu: bool) -> dict[str, Any]:
        """Arguments of vLLM's AsyncEngineArgs. One slot more than adapters, as the server has it."""
        args: dict[str, Any] = {
            "model": self.model,
            "dtype": precision(self.dtype, on_cpu=on_cpu),
            "max_num_seqs": self.max_running,
            "enable_prefix_caching": self.prefix_cache,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if on_cpu:
            args |= {"enforce_eager": True, "max_num_batched_tokens": max(_STEP_TOKENS, self.max_running)}
        else:
            args |= {"gpu_memory_utilization": self.gpu_share}
        if self.lora is not None:
            args |= {
                "enable_lora": True,
                "max_loras": self.lora.slots + 1,
                "max_cpu_loras": self.lora.slots + 1,
                "max_lora_rank": max_rank_for(self.lora.rank),
                "lora_target_modules": list(self.lora.targets),
            }
        return args

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineSpec:
        """The inverse of `to_json`."""
        lora = data.pop("lora")
        spec = cls(**data)
        return replace(spec, lora=Lora(**lora | {"targets": tuple(lora["targets"])})) if lora else spec


def tensor_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model folder, from its safetensors headers. Raises FileNotFoundError without any."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{model} holds no .safetensors file: name the folder of a base model")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    return shapes


def on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build, told without importing it: that build is a distribution of its own."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def build(spec: EngineSpec) -> Any:
    """Start the engine in this process, whose environment is `spec.environment()`; returns its AsyncLLM."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as the server does: it compiles even in eager mode
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = spec.engine_args(current_platform.is_cpu())
    if spec.every_core and current_platform.is_cpu():
        args["distributed_executor_backend"] = on_every_core()
    if spec.profile_dir:
        from vllm.config import ProfilerConfig

        args["profiler_config"] = ProfilerConfig(
            profiler="torch", torch_profiler_dir=spec.profile_dir, torch_profiler_with_stack=False, ignore_frontend=True
        )
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


def stopping(llm: Any) -> Callable[[], Awaitable[None]]:
    """How to stop the engine's processes and wait for them."""

    async def stop() -> None:
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # it would log the end of the engine as an error
        await asyncio.to_thread(llm.shutdown, _STOP_S)

    return stop


def facts(llm: Any) -> dict[str, Any]:
    """What the engine turned out to be: version, device, precision, and whose code applies adapters."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    cache = llm.vllm_config.cache_config
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": llm.vllm_config.device_config.device_type,
        "device_name": current_platform.get_device_name(),
        "dtype": str(llm.model_config.dtype).removeprefix("torch."),
        "kv_cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "lora_wrapper": current_platform.get_punica_wrapper(),
    }
