"""Processes of ours that a test starts and ends."""

from __future__ import annotations

import signal
import subprocess
import sys


class Process:
    """A process that can be killed and started again; it listens on one port."""

    def __init__(self, *command: str) -> None:
        self._command = command
        self.start()

    def start(self) -> None:
        """Start it (again)."""
        self.process = subprocess.Popen([sys.executable, "-m", *self._command], start_new_session=True)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, by default without a chance to say anything."""
        self.process.send_signal(number)
        self.process.wait(10)
