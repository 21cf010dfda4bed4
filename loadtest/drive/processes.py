"""The processes below another: they may end, or be dead and not waited for, at any moment while one looks."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def below(pid: int, words: Iterable[str] = ("",)) -> list[psutil.Process]:
    """The living processes below `pid`, at any depth, whose command line has one of `words` in it (by default all)."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # a zombie too
            continue
        if any(word in line for word in words):
            found.append(process)
    return found
