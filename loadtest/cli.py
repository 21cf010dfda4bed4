"""`loraplex loadtest`: says whether a server meets your requirements. What is heavy is imported where it is used."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from loadtest.errors import BadInput, Exit, LoadTestError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False)

_DEFAULT = "127.0.0.1:50051"
_TARGET = "Replicas of one server, or the URL of an OpenAI server."
_SIDES = "Two targets, or with --serve two YAML files of settings."


def _shipped(incomplete: str) -> list[str]:
    """For the shell's completion: names of scenarios, and .yaml files here."""
    from loadtest.plan.scenario import shipped

    return [name for name in (*shipped(), *map(str, Path().glob("*.yaml"))) if name.startswith(incomplete)]


Names = Annotated[
    list[str],
    typer.Argument(
        metavar="SCENARIO...",
        help="Such as cliff or cliff/a16 (see `scenarios`), or .yaml files.",
        autocompletion=_shipped,
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="The short form, for a machine without a GPU.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the workload, e.g. duration=30s."),
]
Require = Annotated[Path | None, typer.Option("--require", metavar="FILE", help="Requirements, as YAML.")]
Slo = Annotated[str, typer.Option("--slo", help="Requirements in a line: 'ttft.p99<500ms,attainment>=0.95'.")]


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
    show: Annotated[str, typer.Option(metavar="NAME", help="Print this one's YAML.", autocompletion=_shipped)] = "",
) -> None:
    """List the shipped scenarios, or show one: a copy of it is the beginning of your own."""
    _ended(lambda: _scenarios(show))


@app.command()
def plan(
    names: Names,
    quick: Quick = False,
    sets: Sets = None,
    capacity: Annotated[float, typer.Option(min=0.001, help="Requests/s to take for 1x.")] = 1.0,
) -> None:
    """Say what a run would send, how long it takes and whether its samples suffice, without sending anything."""
    _ended(lambda: _plan(names, quick, sets or [], capacity))


@app.command()
def run(
    names: Names,
    target: Annotated[str, typer.Option(metavar="HOST:PORT[,...]", help=_TARGET, envvar="LORAPLEX_SERVER")] = _DEFAULT,
    serve: Annotated[Path | None, typer.Option(metavar="MODEL", help="Start a server of this model for the run.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="With --serve: adapter folders to publish.")] = None,
    engine: Annotated[str, typer.Option(help="With --serve: vllm or fake.")] = "vllm",
    model: Annotated[str, typer.Option(help="For an OpenAI server: the base model's name there.")] = "",
    quick: Quick = False,
    sets: Sets = None,
    require: Require = None,
    slo: Slo = "",
    workers: Annotated[int, typer.Option(min=0, help="Client processes; 0 sends from this one.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write; default .loraplex/loadtest/<time>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead of tables.")] = False,
) -> None:  # fmt: skip
    """Run scenarios and end with a verdict on every requirement, and a report."""
    from loadtest.commands.run import Options, execute

    def work() -> Coroutine[Any, Any, Exit]:
        overrides = _overrides(sets or [], require, slo)
        options = Options(names, target, serve, adapter or [], engine, model, quick, overrides, workers)
        return execute(options, folder or _default_folder(), as_json=as_json)

    _ended(work)


@app.command()
def search(
    names: Names,
    target: Annotated[str, typer.Option(metavar="HOST:PORT[,...]", help=_TARGET, envvar="LORAPLEX_SERVER")] = _DEFAULT,
    serve: Annotated[Path | None, typer.Option(metavar="MODEL", help="Start a server of this model for the run.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="With --serve: adapter folders to publish.")] = None,
    engine: Annotated[str, typer.Option(help="With --serve: vllm or fake.")] = "vllm",
    model: Annotated[str, typer.Option(help="For an OpenAI server: the base model's name there.")] = "",
    start: Annotated[float, typer.Option("--from", min=0, help="Begin with this rate; 0: the scenario's.")] = 0.0,
    tolerance: Annotated[str, typer.Option(help="How close to the limit the answer has to be.")] = "5%",
    budget: Annotated[str, typer.Option(help="Stop, with what is known by then, after this time.")] = "30m",
    times: Annotated[int, typer.Option(min=1, help="Runs at the highest rate that must all meet.")] = 3,
    wanted: Annotated[float, typer.Option(min=0, help="Requests/s to say the number of replicas for.")] = 0.0,
    quick: Quick = False,
    sets: Sets = None,
    require: Require = None,
    slo: Slo = "",
    workers: Annotated[int, typer.Option(min=0, help="Client processes; 0 sends from this one.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write; default .loraplex/loadtest/<time>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead of tables.")] = False,
) -> None:  # fmt: skip
    """Find the highest rate (or number of callers, in a closed loop) that meets the requirements.

    Examples:
      loraplex loadtest search steady --target gpu-1:50051 --slo 'ttft.p95<500ms,tpot.p95<50ms' --wanted 120
      loraplex loadtest search steady --serve MODEL --adapter support/v1 --quick --budget 10m

    Doubles the rate until it does not meet, then halves the gap; every probe is as long as its requirements need samples, and
    the rate that is named has met them in several runs. Exit codes: 0 found, 1 no rate meets, 3 a wrong answer, 4 not
    settled within the budget.
    """
    from loadtest.commands.run import Options
    from loadtest.commands.search import Bounds
    from loadtest.commands.search import search as searching
    from loadtest.plan import values

    def work() -> Coroutine[Any, Any, Exit]:
        close, seconds_in_all = (
            _value(values.share, "--tolerance", tolerance),
            _value(values.seconds, "--budget", budget),
        )
        overrides = _overrides(sets or [], require, slo)
        options = Options(names, target, serve, adapter or [], engine, model, quick, overrides, workers)
        bounds = Bounds(start, max(close, 0.001), seconds_in_all, times, wanted)
        return searching(options, bounds, folder or _default_folder(), as_json=as_json)

    _ended(work)


@app.command()
def compare(
    targets: Annotated[list[str] | None, typer.Argument(metavar="[A B]", help=_SIDES)] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="May be repeated.", autocompletion=_shipped)] = None,
    serve: Annotated[Path | None, typer.Option(metavar="MODEL", help="Start the servers, of this model.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="With --serve: adapter folders to publish.")] = None,
    engine: Annotated[str, typer.Option(help="With --serve: vllm or fake.")] = "vllm",
    peer: Annotated[str, typer.Option(help="With --serve: start this as A; vllm is vLLM's own server.")] = "",
    model: Annotated[str, typer.Option(help="For an OpenAI server: the base model's name there.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs of each case; three or more for a verdict.")] = 3,
    tolerance: Annotated[str, typer.Option(help="A difference that does not matter.")] = "10%",
    quick: Quick = False,
    sets: Sets = None,
    require: Require = None,
    slo: Slo = "",
    workers: Annotated[int, typer.Option(min=0, help="Client processes; 0 sends from this one.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write; default .loraplex/loadtest/<time>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead of tables.")] = False,
) -> None:  # fmt: skip
    """Send the same requests to two targets in turns, and say whether B is worse than A.

    Examples:
      loraplex loadtest compare old:50051 new:50051 --scenario steady --scenario skew
      loraplex loadtest compare small.yaml large.yaml --serve MODEL --adapter support/v1    (settings of loraplex serve)
      loraplex loadtest compare --serve MODEL --adapter support/v1 --peer vllm --scenario cliff --quick

    Rates that are shares of the capacity are shares of the slower one's. Exit codes: 0 not worse, 1 worse, 3 B answered
    wrongly, 4 open.
    """
    from loadtest.commands.compare import CompareOptions
    from loadtest.commands.compare import compare as comparing
    from loadtest.plan import values

    def work() -> Coroutine[Any, Any, Exit]:
        options = CompareOptions(
            scenario or ["steady"], targets or [], serve, adapter or [], engine, peer, model, quick,
            _overrides(sets or [], require, slo), workers, rounds, _value(values.share, "--tolerance", tolerance),
        )  # fmt: skip
        return comparing(options, folder or _default_folder(), as_json=as_json)

    _ended(work)


@app.command()
def replay(
    tape: Annotated[Path, typer.Argument(help="A tape of an earlier run (tapes/*.parquet).")],
    target: Annotated[str, typer.Option(help="host:port", envvar="LORAPLEX_SERVER")] = "127.0.0.1:50051",
    slo: Slo = "",
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write.")] = None,
) -> None:
    """Send exactly the requests of an earlier run again."""
    from loadtest.commands.run import Options, execute

    def work() -> Coroutine[Any, Any, Exit]:
        options = Options([], target, None, [], "vllm", "", False, _overrides([], None, slo), 1, tape)
        return execute(options, folder or _default_folder(), as_json=False)

    _ended(work)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Print the tables of an earlier run again."""
    _ended(lambda: _report(folder))


@app.command()
def selftest(
    long: Annotated[bool, typer.Option("--long", help="100 planted faults and 20 clean runs: two minutes.")] = False,
) -> None:
    """Test this harness against a scripted server: planted faults, clean runs, and percentiles whose truth is known."""
    _ended(lambda: asyncio.run(_selftest(long)))


@app.command()
def faults(
    model: Annotated[Path, typer.Argument(help="The base model's folder.")],
    adapter: Annotated[Path, typer.Option(help="An adapter folder: what the run's own adapters are shaped like.")],
    count: Annotated[int, typer.Option(min=1, help="How many faults; of 24 and more each kind comes at least once.")] = 200,
    seed: Annotated[int, typer.Option(help="Which faults, and when.")] = 1,
    engine: Annotated[str, typer.Option(help="vllm, or fake: without the faults of processes.")] = "vllm",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:  # fmt: skip
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

    _ended(lambda: execute(Plan(model, adapter, count, seed, engine), as_json=as_json))


def _ended(work: Callable[[], Exit | Coroutine[Any, Any, Exit] | None]) -> None:
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


def _value(read: Callable[[Any], float], flag: str, text: str) -> float:
    try:
        return read(text)
    except ValueError as error:
        raise BadInput(f"{flag}: {error}") from error


def _default_folder() -> Path:
    return Path(".loraplex/loadtest") / time.strftime("%Y%m%d-%H%M%S")


def _overrides(sets: list[str], require: Path | None, slo: str) -> dict[str, Any]:
    import yaml

    from loadtest.plan.requirements import from_conditions
    from loadtest.plan.scenario import merged
    from loadtest.plan.strict import read_yaml

    found: dict[str, Any] = {}
    for one in sets:
        key, separator, value = one.partition("=")
        if not separator:
            raise BadInput(f"--set {one}: write KEY=VALUE")
        found[key] = yaml.safe_load(value)
    needed = merged(read_yaml(require) if require else {}, from_conditions(slo))
    return found | ({"requirements": needed} if needed else {})


def _scenarios(name: str) -> None:
    from importlib import resources

    from loadtest.plan import scenario

    if name:
        scenario.load(name)
        out.print((resources.files("loadtest") / "scenarios" / f"{name}.yaml").read_text(), markup=False, end="")
        return
    for one in scenario.shipped():
        found = scenario.load(one)
        out.print(f"[bold]{one:11}[/] {found.about}" + (f" ({len(found.cases)} cases)" if found.cases else ""))


def _plan(names: list[str], quick: bool, sets: list[str], capacity: float) -> None:
    from loadtest.plan.forecast import forecast

    for line in forecast(names, quick, _overrides(sets, None, ""), capacity):
        out.print(line)


def _report(folder: Path) -> None:
    from loadtest.commands.run import show

    try:
        data = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} holds no run: {error}") from error
    show(data)


async def _selftest(long: bool) -> Exit:
    from rich.progress import Progress

    from loadtest.selftest import trials
    from loadtest.selftest.server import FAULTS, Script, ScriptedServer

    faults, clean = (trials.LONG, trials.CLEAN) if long else (len(FAULTS), 3)
    server = ScriptedServer(Script())
    await server.start()
    try:
        with Progress(console=err, transient=True) as bar:
            task = bar.add_task("self-test", total=faults + clean + 1)
            outcome = await trials.run(
                server, faults, clean, lambda what: bar.update(task, advance=1, description=what)
            )
    finally:
        await server.stop()
    out.print(f"planted faults found: {outcome.planted - len(outcome.missed)} of {outcome.planted}")
    out.print(f"clean runs with an alarm: {len(outcome.alarms)} of {outcome.clean}")
    for name, reported, true in outcome.percentiles:
        out.print(f"{name}: reported {reported * 1000:.2f} ms, true {true * 1000:.2f} ms")
    for problem in (*outcome.missed, *outcome.alarms, *outcome.untrue):
        out.print(f"[red]{problem}[/]")
    return Exit.PASS if outcome.passed else Exit.MISSED


def main() -> None:
    """`python -m loadtest`."""
    app(prog_name="loadtest")
