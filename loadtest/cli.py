"""`loraplex loadtest`: the table of its commands. What each does is in loadtest/commands, and imported when it runs."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.commands.params import (
    DEFAULT_TARGET,
    TARGET_VARIABLE,
    Adapters,
    Engine,
    Folder,
    Json,
    Names,
    OpenAIModel,
    Quick,
    Require,
    Serve,
    Sets,
    Slo,
    Target,
    Workers,
    default_folder,
    overrides,
    scenario_names,
    value,
)
from loadtest.console import exit_with
from loadtest.errors import Exit

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback()
def loadtest() -> None:
    """Put load on a server and say whether it meets your requirements.

    Examples:
      loraplex loadtest run smoke --serve .models/smollm2-135m-instruct --quick
      loraplex loadtest run steady --target gpu-1:50051 --slo 'ttft.p99<500ms,good.ttft<500ms,attainment>=0.95'
      loraplex loadtest plan cliff --set adapters=64

    Exit codes: 0 meets, 1 does not, 2 wrong usage, 3 a wrong answer was given, 4 the client was too slow or there were too
    few samples to say, 5 the target is unreachable or died, 130 interrupted.
    """


@app.command()
def scenarios(
    show: Annotated[
        str, typer.Option(metavar="NAME", help="Print this one's YAML.", autocompletion=scenario_names)
    ] = "",
) -> None:
    """List the shipped scenarios, or show one: a copy of it is the beginning of your own."""
    from loadtest.commands.scenarios import execute

    exit_with(lambda: execute(show))


@app.command()
def plan(
    names: Names,
    quick: Quick = False,
    sets: Sets = None,
    capacity: Annotated[float, typer.Option(min=0.001, help="Requests/s to take for 1x.")] = 1.0,
) -> None:
    """Say what a run would send, how long it takes and whether its samples suffice, without sending anything."""
    from loadtest.commands.plan import execute

    exit_with(lambda: execute(names, overrides(sets), capacity, quick=quick))


@app.command()
def run(
    names: Names,
    target: Target = DEFAULT_TARGET,
    serve: Serve = None,
    adapters: Adapters = None,
    engine: Engine = "vllm",
    model: OpenAIModel = "",
    quick: Quick = False,
    sets: Sets = None,
    require: Require = None,
    slo: Slo = "",
    workers: Workers = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Run scenarios and end with a verdict on every requirement, and a report."""
    from loadtest.commands.run import Options, execute

    def work() -> Coroutine[Any, Any, Exit]:
        options = Options(
            names=names,
            target=target,
            serve=serve,
            adapters=adapters or [],
            engine=engine,
            model=model,
            quick=quick,
            overrides=overrides(sets, require, slo),
            workers=workers,
        )
        return execute(options, folder or default_folder(), as_json=as_json)

    exit_with(work)


@app.command()
def search(
    names: Names,
    target: Target = DEFAULT_TARGET,
    serve: Serve = None,
    adapters: Adapters = None,
    engine: Engine = "vllm",
    model: OpenAIModel = "",
    start: Annotated[float, typer.Option("--from", min=0, help="Begin with this rate; 0: the scenario's.")] = 0.0,
    tolerance: Annotated[str, typer.Option(help="How close to the limit the answer has to be.")] = "5%",
    budget: Annotated[str, typer.Option(help="Stop, with what is known by then, after this time.")] = "30m",
    times: Annotated[int, typer.Option(min=1, help="Runs at the highest rate that must all meet.")] = 3,
    wanted: Annotated[float, typer.Option(min=0, help="Requests/s to say the number of replicas for.")] = 0.0,
    quick: Quick = False,
    sets: Sets = None,
    require: Require = None,
    slo: Slo = "",
    workers: Workers = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Find the highest rate (or number of callers, in a closed loop) that meets the requirements.

    Examples:
      loraplex loadtest search steady --target gpu-1:50051 --slo 'ttft.p95<500ms,tpot.p95<50ms' --wanted 120
      loraplex loadtest search steady --serve MODEL --adapter support/v1 --quick --budget 10m

    Doubles the rate until it does not meet, then halves the gap; every probe is as long as its requirements need samples, and
    the rate that is named has met them in several runs. Exit codes: 0 found, 1 no rate meets, 3 a wrong answer, 4 not
    settled within the budget.
    """
    from loadtest.commands.run import Options
    from loadtest.commands.search import Bounds, execute
    from loadtest.plan import values

    def work() -> Coroutine[Any, Any, Exit]:
        bounds = Bounds(
            start=start,
            tolerance=max(value(values.share, "--tolerance", tolerance), 0.001),
            budget_s=value(values.seconds, "--budget", budget),
            times=times,
            wanted=wanted,
        )
        options = Options(
            names=names,
            target=target,
            serve=serve,
            adapters=adapters or [],
            engine=engine,
            model=model,
            quick=quick,
            overrides=overrides(sets, require, slo),
            workers=workers,
        )
        return execute(options, bounds, folder or default_folder(), as_json=as_json)

    exit_with(work)


@app.command()
def compare(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A B]", help="Two targets, or with --serve two YAML files of settings."),
    ] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="May be repeated.", autocompletion=scenario_names)] = None,
    serve: Annotated[Path | None, typer.Option(metavar="MODEL", help="Start the servers, of this model.")] = None,
    adapters: Adapters = None,
    engine: Engine = "vllm",
    peer: Annotated[str, typer.Option(help="With --serve: start this as A; vllm is vLLM's own server.")] = "",
    model: OpenAIModel = "",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs of each case; three or more for a verdict.")] = 3,
    tolerance: Annotated[str, typer.Option(help="A difference that does not matter.")] = "10%",
    quick: Quick = False,
    sets: Sets = None,
    require: Require = None,
    slo: Slo = "",
    workers: Workers = 1,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Send the same requests to two targets in turns, and say whether B is worse than A.

    Examples:
      loraplex loadtest compare old:50051 new:50051 --scenario steady --scenario skew
      loraplex loadtest compare small.yaml large.yaml --serve MODEL --adapter support/v1    (settings of loraplex serve)
      loraplex loadtest compare --serve MODEL --adapter support/v1 --peer vllm --scenario cliff --quick

    Rates that are shares of the capacity are shares of the slower one's. Exit codes: 0 not worse, 1 worse, 3 B answered
    wrongly, 4 open.
    """
    from loadtest.commands.compare import CompareOptions, execute
    from loadtest.plan import values

    def work() -> Coroutine[Any, Any, Exit]:
        options = CompareOptions(
            names=scenario or ["steady"],
            targets=targets or [],
            serve=serve,
            adapters=adapters or [],
            engine=engine,
            peer=peer,
            model=model,
            quick=quick,
            overrides=overrides(sets, require, slo),
            workers=workers,
            rounds=rounds,
            tolerance=value(values.share, "--tolerance", tolerance),
        )
        return execute(options, folder or default_folder(), as_json=as_json)

    exit_with(work)


@app.command()
def replay(
    tape: Annotated[Path, typer.Argument(help="A tape of an earlier run (tapes/*.parquet).")],
    target: Annotated[str, typer.Option(help="host:port", envvar=TARGET_VARIABLE)] = DEFAULT_TARGET,
    slo: Slo = "",
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write.")] = None,
) -> None:
    """Send exactly the requests of an earlier run again."""
    from loadtest.commands.run import Options, execute

    def work() -> Coroutine[Any, Any, Exit]:
        options = Options(names=[], target=target, overrides=overrides(slo=slo), tape=tape)
        return execute(options, folder or default_folder(), as_json=False)

    exit_with(work)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Print the tables of an earlier run again."""
    from loadtest.commands.report import execute

    exit_with(lambda: execute(folder))


@app.command()
def selftest(
    long: Annotated[bool, typer.Option("--long", help="100 planted faults and 20 clean runs: two minutes.")] = False,
) -> None:
    """Test this harness against a scripted server: planted faults, clean runs, and percentiles whose truth is known."""
    from loadtest.commands.selftest import execute

    exit_with(lambda: execute(long=long))


@app.command()
def faults(
    model: Annotated[Path, typer.Argument(help="The base model's folder.")],
    adapter: Annotated[Path, typer.Option(help="An adapter folder: what the run's own adapters are shaped like.")],
    count: Annotated[
        int, typer.Option(min=1, help="How many faults; of 24 and more each kind comes at least once.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Which faults, and when.")] = 1,
    engine: Annotated[str, typer.Option(help="vllm, or fake: without the faults of processes.")] = "vllm",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Break one tenant's adapters, the storage and the engine's processes under load; nobody else may notice.

    Example:
      loraplex loadtest faults .models/smollm2-135m-instruct --adapter examples/support/v1

    Starts a server. Files vanish, shrink, are swapped and poisoned in the
    registry, in the server's copies and while they are loaded; what does not
    load is promoted; callers leave; the storage goes away; the engine's
    processes stand still and are killed. It passes if every request got a
    final status that says something, every answer was that of the adapter it
    names, and all requests of the other tenants were answered.
    """
    from loadtest.faults.command import execute
    from loadtest.faults.run import Plan

    exit_with(lambda: execute(Plan(model, adapter, count, seed, engine), as_json=as_json))


def main() -> None:
    """`python -m loadtest`."""
    app(prog_name="loadtest")
