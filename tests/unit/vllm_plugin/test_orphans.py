"""Processes that vLLM starts for our server end with it, even if it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SERVER = """
import multiprocessing, time
from engine.vllm_plugin import end_with_parent

def work(ready):
    end_with_parent()
    ready.put(multiprocessing.current_process().pid)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    context.Process(target=work, args=(ready,)).start()
    print(ready.get(), flush=True)
    time.sleep(60)
"""


def test_ends_with_its_parent(tmp_path: Path) -> None:
    """SIGKILL for the server is the end of its engine process."""
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        child = int(server.stdout.readline())
        os.kill(child, 0)
        server.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
