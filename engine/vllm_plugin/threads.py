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

    OMP_NUM_THREADS stands if it is set: Ray sets it to a replica's share of the CPUs. So does vLLM's own setting of the cores
    to use, VLLM_CPU_OMP_THREADS_BIND, such as "0-3,8". Raises ValueError when that cannot be read.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, parse_id_list

    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if bound in ("auto", "nobind"):
        os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads(get_allowed_cpu_list())))
    else:
        try:
            cpus = parse_id_list(bound)
        except ValueError as error:
            raise ValueError(f"VLLM_CPU_OMP_THREADS_BIND={bound!r} is no list of cores for one engine") from error
        for name, value in bound_to(cpus).items():
            os.environ.setdefault(name, value)
    return "engine.vllm_plugin.executor.InProcessExecutor"


def bound_to(cpus: Sequence[int]) -> dict[str, str]:
    """OpenMP's settings (5.2, section 21.1) for one thread on each of these logical CPUs."""
    places = ",".join(f"{{{cpu}}}" for cpu in cpus)
    return {"OMP_NUM_THREADS": str(len(cpus)), "OMP_PLACES": places, "OMP_PROC_BIND": "true"}


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
