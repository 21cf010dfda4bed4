"""How many threads an engine on a CPU computes with, and in which process: executor.py says why."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "MICROSECONDS PERIOD": docs.kernel.org, cgroup-v2, CPU


class Cpu(Protocol):
    """A logical CPU, as vLLM describes it."""

    physical_core: int
    numa_node: int


def on_every_core() -> str:
    """Have vLLM's processes, which are started later, compute with every core; returns the executor to name to vLLM.

    OMP_NUM_THREADS stands if it is set: Ray sets it to a replica's share of the CPUs.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads(get_allowed_cpu_list())))
    return "engine.vllm_plugin.executor.InProcessExecutor"


def compute_threads(allowed: Sequence[Cpu], quota: Path = _QUOTA) -> int:
    """One for each physical core of the memory node that vLLM's CPU worker binds itself to, the first of the `allowed`.

    No more than the container's CPU limit (`quota`, a file of control groups v2): threads beyond it would stand still in
    turn, and the others wait for them.
    """
    cores = len({cpu.physical_core for cpu in allowed if cpu.numa_node == allowed[0].numa_node})
    limit = _limit(quota)
    return cores if limit is None else min(cores, limit)


def _limit(quota: Path) -> int | None:
    try:
        granted, period = quota.read_text().split()
    except (OSError, ValueError):
        return None
    return None if granted == "max" else math.ceil(int(granted) / int(period))
