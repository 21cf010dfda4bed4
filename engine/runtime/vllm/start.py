"""What vLLM is started with: its arguments, its environment, its metrics. Nothing is ever fetched from a hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine import vllm_plugin
from engine.config import Settings
from engine.errors import BadConfiguration
from engine.registry.fingerprint import check_base
from engine.registry.tensor_checks import adaptable_layers
from engine.runtime.vllm.resume import PROCESSOR
from engine.vllm_plugin.precision import precision
from engine.vllm_plugin.threads import on_every_core


def prepare_environment(settings: Settings) -> None:
    """Set what vLLM reads when it is imported, in every one of its processes."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # vLLM would download an adapter path that does not exist
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[vllm_plugin.SWITCH] = settings.lora_kernels
    os.environ[vllm_plugin.ORPHANS_END] = "1"
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"
    if settings.otlp_endpoint:
        os.environ.setdefault("OTEL_SERVICE_NAME", "loraplex")  # of vLLM's own spans
    if _on_cpu():
        # vLLM compiles its log-probability kernels on first use even in eager mode: 20 s in which every caller waits.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def engine_args(settings: Settings, folder: Path, slots: int) -> dict[str, Any]:
    """The arguments of vLLM's AsyncEngineArgs for the base in `folder`, with LoRA slots for `slots` adapters.

    Raises BadConfiguration when vLLM's own setting of the cores cannot be read.
    """
    on_cpu = _on_cpu()
    _, tensors = check_base(folder)
    return {
        "model": str(folder),
        "dtype": precision(settings.dtype, on_cpu=on_cpu),
        "max_model_len": settings.context_length,
        "max_num_seqs": settings.max_running + 2,  # two probes beside all requests
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": slots,
        "max_lora_rank": settings.max_rank,
        "lora_target_modules": list(adaptable_layers({name: tensor.shape for name, tensor in tensors.items()})),
        "enable_prefix_caching": settings.prefix_cache,
        "gpu_memory_utilization": settings.gpu_memory_share,
        "structured_outputs_config": {"backend": "guidance"},
        "logits_processors": [PROCESSOR],
        "trust_remote_code": False,
        "enforce_eager": on_cpu,  # graphs only help GPUs
        # Fewer tokens per step than vLLM's 2,048: a CPU takes seconds for those, and start-up rehearses a full step.
        "max_num_batched_tokens": max(512, settings.max_running) if on_cpu else None,
        # Tokens of a block of keys and values: what prompts share is found by whole blocks. vLLM takes 128 on CPUs, more
        # than most instructions have; 32, the least that its kernels there take, are as fast.
        "block_size": 32 if on_cpu else None,
        "disable_log_stats": True,
        "otlp_traces_endpoint": settings.otlp_endpoint or None,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "engine.vllm_plugin.worker.LoraplexWorker",
        "distributed_executor_backend": _executor() if on_cpu and settings.tensor_parallel == 1 else None,
        "scheduler_cls": "engine.vllm_plugin.scheduler.ZeroingScheduler" if on_cpu else None,
    }


def own_metrics() -> Any:
    """The metrics of vLLM itself, which it puts into prometheus_client's registry, without the one whose labels are unbounded.

    `vllm:lora_requests_info` has the names of all adapters in a step as one label: a new series for each mixture.
    """
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class OwnMetrics(PrometheusStatLogger):  # type: ignore[misc]
        """Bounded labels only."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            unbounded: Any = self.gauge_lora_info  # type: ignore[has-type]
            if unbounded is not None:
                REGISTRY.unregister(unbounded)
                self.gauge_lora_info = None

    return OwnMetrics


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _executor() -> str:
    try:
        return on_every_core()
    except ValueError as error:
        raise BadConfiguration(str(error), fix="Write it as 0-3,8, or leave it out to use every core.") from error
