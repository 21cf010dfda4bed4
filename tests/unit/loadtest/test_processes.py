"""Whoever looks at processes meets dead ones."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from loadtest.drive.processes import below


def test_a_dead_child_is_passed_over() -> None:
    """A child that ended and was not waited for has no command line, and hides nobody."""
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    alive = subprocess.Popen([sys.executable, "-c", "input()  # the living one"], stdin=subprocess.PIPE)
    try:
        while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert dead.pid not in [one.pid for one in below(os.getpid())]
        assert [one.pid for one in below(os.getpid(), ["the living one", "nobody"])] == [alive.pid]
        assert below(os.getpid(), ["nobody"]) == []
    finally:
        alive.communicate()
        dead.wait()
