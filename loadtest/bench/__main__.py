"""`make bench`: one command for each part. `python -m loadtest.bench --help` says what they are."""

from __future__ import annotations

import sys

import typer

from loadtest.bench import output
from loadtest.bench.adapters.command import adapters
from loadtest.bench.child import ContenderDied
from loadtest.bench.frontend.command import frontend

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("adapters")(adapters)
app.command("frontend")(frontend)


@app.callback()
def bench() -> None:
    """Measure Loraplex against what else there is, each contender in a process of its own."""


def main() -> None:
    """Run a part; a contender that has died is one message, with the end of its log, and exit code 1."""
    try:
        app()
    except ContenderDied as error:
        output.note(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
