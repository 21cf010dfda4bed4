"""`make bench`: one command for each part. `python -m loadtest.bench --help` says what they are."""

from __future__ import annotations

import os
import sys

import typer

from loadtest.bench import output
from loadtest.bench.adapters.command import adapters
from loadtest.bench.child import ContenderDied
from loadtest.bench.client import client
from loadtest.bench.endurance.command import endurance
from loadtest.bench.eviction import eviction
from loadtest.bench.frontend.command import frontend
from loadtest.bench.identity import identity
from loadtest.bench.memory import memory
from loadtest.bench.profile import profile
from loadtest.bench.residency.command import residency
from loadtest.bench.router.affinity import affinity
from loadtest.bench.router.command import router
from loadtest.bench.tuning.command import tuning

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PARTS = (
    adapters,
    frontend,
    identity,
    memory,
    profile,
    residency,
    eviction,
    router,
    affinity,
    tuning,
    client,
    endurance,
)
for part in PARTS:
    app.command()(part)


@app.command("all")
def everything(
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
) -> None:
    """All parts as they are without options, one after the other: about an hour and a half on two cores.

    Examples:
      make bench ARGS="all"
      make bench ARGS="all --report docs/bench"
    """
    os.environ[output.MODEL] = str(model)  # not all of them ask for one
    for part in PARTS:
        app(args=[part.__name__, "--report", str(report)], standalone_mode=False)


@app.callback()
def bench() -> None:
    """Measure Loraplex: each contender in a process of its own, medians over rounds, ratios to a baseline of the same run.

    Examples:
      make bench                           adapters, then frontend
      make bench ARGS="adapters --help"    what one part can do
      make bench ARGS="memory --slots 8,64"

    Every part prints a table and writes its JSON into out/bench, and the part
    adapters a chart.
    """


def main() -> None:
    """Run a part; a contender that has died is one message, with the end of its log, and exit code 1."""
    try:
        app(prog_name="python -m loadtest.bench")
    except ContenderDied as error:
        output.note(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
