"""Our plugin of vLLM: LoRA kernels for CPUs that are right for every row of a batch, and cost little.

vLLM 0.32's own (PunicaWrapperCPU) give a row without an adapter the adapter in the last slot, and copy an adapter's weights for
every token. vLLM calls `register` in each of its processes, by the entry point in pyproject.toml; it names our platform
class (platform.py), which has vLLM use our wrapper (wrapper.py) around the kernels (kernels.py, lora.cpp), and normalise by
its own C++ (norms.py).
Without LoRA, and on anything but a CPU, nothing changes.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

TESTED_VLLM = ("0.32.0",)  # the interface between vLLM and its LoRA kernels is not a public one
SWITCH = "LORAPLEX_LORA_KERNELS"
ORPHANS_END = "LORAPLEX_ORPHANS_END"  # set by our server for the processes that vLLM starts for it

_WATCH = "loraplex-parent-watch"

log = logging.getLogger(__name__)


def register() -> str | None:
    """The name of our platform class, or None to leave vLLM as it is.

    LORAPLEX_LORA_KERNELS: "auto" (the default) steps aside with a warning on a vLLM that it was not tested with, "force"
    does not, "off" always steps aside.
    """
    if os.environ.get(ORPHANS_END):
        end_with_parent()
    from packaging.version import Version
    from vllm import __version__, platforms

    choice = os.environ.get(SWITCH, "auto")
    if choice == "off" or platforms.cpu_platform_plugin() is None:
        return None
    if choice not in ("auto", "force"):
        log.warning("%s=%s is not one of auto, force, off: taken for auto", SWITCH, choice)
    if Version(__version__).base_version not in TESTED_VLLM and choice != "force":
        log.warning(
            "vLLM %s is not one that Loraplex's LoRA kernels were tested with (%s), so vLLM's own are used: slower, and "
            "base-model requests may get an adapter's answers; %s=force uses ours",
            *(__version__, ", ".join(TESTED_VLLM), SWITCH),
        )
        return None
    return "engine.vllm_plugin.platform.LoraplexCpuPlatform"


def end_with_parent() -> None:
    """Kill this process when the one that started it is gone, however it went.

    vLLM's engine process does not notice that its server was killed, and keeps the model in memory for ever. (PR_SET_PDEATHSIG
    would fire when the thread that started the process ends.)
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()


def library_path() -> Path | None:
    """Where the compiled kernels are; None if they were not built, for want of a compiler."""
    candidates = (Path(__file__).with_name(f"_lora{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)
