"""vLLM's scheduler, with every block of keys and values zeroed before it is used again.

vLLM hands blocks on as they are, and attention reads all of a block: what lies behind a row's own tokens is masked, but
nothing times NaN is NaN. So NaN that one request left reaches whoever gets its block (on GPUs too: vLLM PR 50283).
vLLM can zero new blocks, and does for models with a recurrent state; here it does for all.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig


class _Zeroed(KVCacheConfig):  # type: ignore[misc]
    """A cache whose new blocks must be zeroed."""

    needs_kv_cache_zeroing = True


class ZeroingScheduler(Scheduler):  # type: ignore[misc]
    """For engines that wait for each step, as those on CPUs do."""

    def __init__(self, *args: Any, kv_cache_config: Any, **more: Any) -> None:
        zeroed = object.__new__(_Zeroed)
        zeroed.__dict__.update(vars(kv_cache_config))
        super().__init__(*args, kv_cache_config=zeroed, **more)
