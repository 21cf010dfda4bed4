"""What commands print to, and how each of them ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from loadtest.errors import Exit, LoadTestError

_PIPE_WIDTH = 160  # columns where no terminal shows it
out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False)


def exit_with(work: Callable[[], Exit | Coroutine[Any, Any, Exit] | None]) -> None:
    """Run a command; say what went wrong and what to do about it, and exit with its code."""
    try:
        done = work()
        code = asyncio.run(done) if asyncio.iscoroutine(done) else done
    except LoadTestError as error:
        err.print(Text("error: ", "bold red").append(error.message, "default"), soft_wrap=True)
        if error.fix:
            err.print(Text("fix: ", "bold").append(error.fix, "default"), soft_wrap=True)
        raise typer.Exit(error.code) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(Exit.INTERRUPTED) from None
    if isinstance(code, Exit) and code:
        raise typer.Exit(code)
