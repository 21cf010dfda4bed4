"""On a CPU, the model runs in the process of vLLM's scheduler, on every core.

vLLM gives its one worker a process of its own there, and the scheduler, which waits for each step's result in a busy loop, a
core of its own: half of a machine with two cores. The reason it names (platforms/cpu.py) is that OpenMP reads its settings
when a process starts. Our server makes them before it starts the engine's process (threads.py), so none of this is needed.
"""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's executor for one worker in the engine's process, under a name that its CPU platform does not replace."""
