"""What a load test can end with, and the errors that end it early."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes. A wrong answer outranks everything measured: a fast wrong server must not look like a tuning problem."""

    PASS = 0
    MISSED = 1
    USAGE = 2
    INCORRECT = 3
    UNRESOLVED = 4
    """The client could not drive the load, or there were too few samples to say."""
    UNREACHABLE = 5
    INTERRUPTED = 130


class LoadTestError(Exception):
    """Ends the tool with `code`; `fix` says what to do about it."""

    code: ClassVar[Exit] = Exit.USAGE

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class BadInput(LoadTestError):
    """A file, a flag or a combination of them cannot be used."""


class TargetGone(LoadTestError):
    """The target cannot be reached, or died although nobody asked it to."""

    code = Exit.UNREACHABLE


class ClientBroken(LoadTestError):
    """A client process died: what was measured until then says nothing."""

    code = Exit.UNRESOLVED
