"""`loraplex simulate`: the router's, admission's and residency's real code, on engines that exist in virtual time only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.commands.output import err, out, show, write_json
from engine.errors import InvalidRequest

if TYPE_CHECKING:
    from engine.cluster.simulation.run import Result

_STICKS = 0.5  # where more of the loaded adapters than this are asked for elsewhere anyway, nothing can be said to move


def simulate(
    replicas: Annotated[
        list[int] | None, typer.Option(min=1, max=512, help="Engines (16); may be given again.", show_default=False)
    ] = None,
    adapters: Annotated[int, typer.Option(min=1, max=100_000, help="Adapters that are asked for.")] = 1000,
    requests: Annotated[int, typer.Option(min=100, max=10_000_000, help="Requests.")] = 10_000,
    load: Annotated[
        list[float] | None,
        typer.Option(
            min=0.01,
            max=2.0,
            help="Share of all engines' capacity that is asked for (0.8); may be given again.",
            show_default=False,
        ),
    ] = None,
    zipf: Annotated[
        float, typer.Option(min=0.0, max=3.0, help="Skew of the adapters' popularity (Zipf's exponent).")
    ] = 1.0,
    burst: Annotated[
        float, typer.Option(min=1.0, max=9.0, help="Bursts: times the mean rate, in one second of every ten.")
    ] = 1.0,
    deaths: Annotated[
        int, typer.Option(min=0, max=511, help="Failures: engines that die in turn, and are back, empty, after 30 s.")
    ] = 0,
    routers: Annotated[int, typer.Option(min=1, max=64, help="Routers, which do not talk to each other.")] = 2,
    engine: Annotated[str, typer.Option(help="Whose times: h100 (published figures) or cpu (measured here).")] = "h100",
    strategy: Annotated[list[str] | None, typer.Option(help="One way to choose a replica; may be given again.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another one makes another traffic.")] = 1,
    chart: Annotated[Path | None, typer.Option(help="Draw the results into this PNG.", dir_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare ways to choose a replica, on up to 512 engines and 100,000 adapters.

    Examples:
      loraplex simulate
      loraplex simulate --replicas 64 --adapters 5000 --requests 20000
      loraplex simulate --strategy ours --strategy oracle --deaths 4 --burst 3
      loraplex simulate --load 0.5 --load 0.7 --load 0.9 --chart loads.png
      loraplex simulate --engine cpu --replicas 2 --adapters 40 --requests 2000

    Routing, admission and residency are the real code; an engine's times are
    modelled (`h100`: an 8B model, from published figures; `cpu`: as measured
    on two cores). Requests come by chance (Poisson) for adapters by Zipf's law;
    --burst makes their rate swing, --deaths kills engines under them, whose
    requests go on elsewhere.

    The oracle knows every engine as it is and all requests to come: no router
    can. Good answers have their first token within a second. What moves are
    adapters that are loaded and would have to be loaded elsewhere when one
    replica joins, or dies; ideally that is the share of the fleet that changes.
    """
    from engine.cluster.simulation.engine import MODELS
    from engine.cluster.simulation.run import STRATEGIES, Simulation
    from engine.cluster.simulation.traffic import Traffic

    names = _known("--strategy", strategy or STRATEGIES, STRATEGIES)
    model = MODELS[_known("--engine", [engine], tuple(MODELS))[0]]
    points = _points(replicas or [16], load or [0.8], deaths)
    _check_chart(chart)
    traffic = Traffic(requests=requests, adapters=adapters, zipf=zipf, burst=burst, seed=seed)
    results: list[Result] = []
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        for (fleet, share), name in product(points, names):
            task = bar.add_task(f"{fleet} engines, {share:.0%}: {name}", total=1.0)
            simulation = Simulation(name, model, fleet, replace(traffic, load=share), routers, deaths)
            results.append(simulation.run(lambda done, task=task: bar.update(task, completed=done)))  # type: ignore[misc]
            bar.update(task, completed=1.0)
    if as_json:
        facts = {"engine": model.name, "source": model.source, "adapters": adapters, "requests": requests, "zipf": zipf}
        more = {"burst": burst, "deaths": deaths, "routers": routers, "seed": seed}
        write_json(facts | more | {"results": [asdict(result) for result in results]})
    else:
        out.print(f"{model.name}: {model.source}", highlight=False, soft_wrap=True)
        for fleet, share in points:
            _print([one for one in results if (one.replicas, one.load) == (fleet, share)])
    if chart:
        from engine.cluster.simulation.chart import draw

        fleets = " to ".join(str(number) for number in dict.fromkeys((points[0][0], points[-1][0])))
        shares = " to ".join(f"{share:g}" for share in dict.fromkeys((points[0][1], points[-1][1])))
        draw(results, f"{fleets} {model.name} engines, {adapters:,} adapters, load {shares}", chart)


def _points(fleets: list[int], loads: list[float], deaths: int) -> list[tuple[int, float]]:
    """The fleets and loads to simulate: several of one of the two."""
    if len(fleets) > 1 and len(loads) > 1:
        raise InvalidRequest("--load", "give several --replicas or several --load, not both")
    if deaths >= min(fleets):
        raise InvalidRequest("--deaths", f"{deaths} leave none of {min(fleets)} engines; one has to stay")
    return list(product(sorted(set(fleets)), sorted(set(loads))))


def _check_chart(chart: Path | None) -> None:
    """See that it can be drawn before minutes have gone into it."""
    if chart is None:
        return
    if chart.suffix != ".png":
        raise InvalidRequest("--chart", f"{chart.name!r} does not end in .png")
    if find_spec("matplotlib") is None:
        raise InvalidRequest("--chart", "needs matplotlib: pip install 'loraplex[bench]'")
    try:
        chart.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest("--chart", f"{chart} cannot be written: {error.strerror}") from error
    if not os.access(chart if chart.exists() else chart.parent, os.W_OK):
        raise InvalidRequest("--chart", f"{chart} cannot be written")


def _print(results: list[Result]) -> None:
    """One fleet's results at one load."""
    first = results[0]
    out.print(f"\n{first.replicas} engines, {first.load:.0%} of their capacity asked for", highlight=False)
    headings = ("TTFT p50", "TTFT p99", "adapter hits", "good answers/s and engine", "moved by one more", "by one less")
    table = Table(box=None, pad_edge=False)
    for heading in ("", *headings, "refused", "lost", "failed over"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in results:
        table.add_row(
            one.strategy, f"{one.ttft_p50_s * 1000:,.0f} ms", f"{one.ttft_p99_s * 1000:,.0f} ms", f"{one.hit_rate:.1%}",
            f"{one.goodput:.2f}", *_moved(one), str(one.refused), str(one.lost), str(one.failovers),
        )  # fmt: skip
    show(table)
    out.print(
        f"Ideal is {1 / (first.replicas + 1):.2%} moved by one more engine, {1 / first.replicas:.2%} by one less. "
        f"No choice of engines brings the p99 below {first.floor_p99_s * 1000:,.0f} ms.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _moved(result: Result) -> tuple[str, str]:
    movement = result.movement
    if movement is None:
        return "", ""
    if movement.astray > _STICKS:
        return "does not stick", f"({movement.astray:.0%} astray)"
    return f"{movement.joined:.2%}", f"{movement.died:.2%}"


def _known(option: str, names: Sequence[str], known: tuple[str, ...]) -> list[str]:
    """The names, each once, if all are known."""
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise InvalidRequest(option, f"{wrong!r} is unknown; choose from {', '.join(known)}")
    return list(dict.fromkeys(names))
