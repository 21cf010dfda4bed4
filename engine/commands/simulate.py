"""`loraplex simulate`: the router's and admission's real code, on engines that exist in virtual time only."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.commands.output import err, out, write_json
from engine.errors import InvalidRequest

if TYPE_CHECKING:
    from engine.cluster.simulation.run import Result


def simulate(
    replicas: Annotated[int, typer.Option(min=1, max=512, help="Engines.")] = 16,
    adapters: Annotated[int, typer.Option(min=1, max=100_000, help="Adapters that are asked for.")] = 1000,
    requests: Annotated[int, typer.Option(min=100, max=10_000_000, help="Requests.")] = 10_000,
    load: Annotated[
        float, typer.Option(min=0.01, max=2.0, help="Share of all engines' capacity that is asked for.")
    ] = 0.8,
    zipf: Annotated[
        float, typer.Option(min=0.0, max=3.0, help="Skew of the adapters' popularity (Zipf's exponent).")
    ] = 1.0,
    burst: Annotated[float, typer.Option(min=1.0, max=9.0, help="Times the mean rate, in a tenth of the time.")] = 1.0,
    deaths: Annotated[int, typer.Option(min=0, max=512, help="Engines that die on the way, one after the other.")] = 0,
    routers: Annotated[int, typer.Option(min=1, max=64, help="Routers, which do not talk to each other.")] = 2,
    engine: Annotated[str, typer.Option(help="Whose times: h100 (published figures) or cpu (measured here).")] = "h100",
    strategy: Annotated[list[str] | None, typer.Option(help="One way to choose a replica; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Another one makes another traffic.")] = 1,
    chart: Annotated[Path | None, typer.Option(help="Draw the results into this PNG.", dir_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare ways to choose a replica, on up to 512 engines and 100,000 adapters.

    Examples:
      loraplex simulate
      loraplex simulate --replicas 64 --adapters 5000 --requests 20000
      loraplex simulate --strategy ours --strategy oracle --deaths 4 --burst 3
      loraplex simulate --engine cpu --replicas 2 --adapters 40 --requests 2000

    Routing and admission are the real code; an engine's times are modelled
    (`h100`: an 8B model, from published figures; `cpu`: as measured on two
    cores). The oracle sees every engine as it is and costs what no router can
    pay. A good answer's first token comes within a second.
    """
    from engine.cluster.simulation.engine import MODELS
    from engine.cluster.simulation.run import STRATEGIES, Simulation
    from engine.cluster.simulation.strategies import moved
    from engine.cluster.simulation.traffic import Traffic

    names = _known("--strategy", strategy or list(STRATEGIES), STRATEGIES)
    model = MODELS[_known("--engine", [engine], tuple(MODELS))[0]]
    traffic = Traffic(requests=requests, adapters=adapters, load=load, zipf=zipf, burst=burst, seed=seed)
    results: list[Result] = []
    columns = (TextColumn("{task.description:18}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        for name in names:
            task = bar.add_task(name, total=1.0)
            simulation = Simulation(name, model, replicas, traffic, routers, min(deaths, replicas - 1))
            results.append(simulation.run(lambda share, task=task: bar.update(task, completed=share)))  # type: ignore[misc]
            bar.update(task, completed=1.0)
    facts = {
        "engine": model.name, "source": model.source, "replicas": replicas, "adapters": adapters, "load": load, "zipf": zipf,
        "burst": burst, "deaths": deaths, "requests": requests,
        "moved_by_one_more_replica": moved(replicas, adapters), "results": [asdict(result) for result in results],
    }  # fmt: skip
    if chart:
        from engine.cluster.simulation.chart import draw

        draw(results, f"{replicas} {model.name} engines, {adapters:,} adapters, load {load:g}", chart)
    if as_json:
        write_json(facts)
        return
    out.print(f"{replicas} engines ({model.name}: {model.source})", highlight=False, soft_wrap=True)
    out.print(_table(results))
    times = facts["moved_by_one_more_replica"]
    out.print(f"One more replica moves {times:.2f} times its ideal share of the adapters.", highlight=False)


def _table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in (
        "",
        "TTFT p50",
        "TTFT p99",
        "adapter hits",
        "good answers/s and engine",
        "refused",
        "lost",
        "failed over",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for one in results:
        table.add_row(
            one.strategy, f"{one.ttft_p50_s * 1000:,.0f} ms", f"{one.ttft_p99_s * 1000:,.0f} ms", f"{one.hit_rate:.1%}",
            f"{one.goodput:.2f}", str(one.refused), str(one.lost), str(one.failovers),
        )  # fmt: skip
    return table


def _known(option: str, names: list[str], known: tuple[str, ...]) -> list[Any]:
    """The names, if all are known."""
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise InvalidRequest(option, f"{wrong!r} is unknown; choose from {', '.join(known)}")
    return names
