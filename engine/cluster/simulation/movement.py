"""How many adapters move when a replica joins or dies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.cluster.routing import Replica, Replicas, Report
from engine.cluster.routing.warming import to_warm
from engine.cluster.simulation.replica import VERSION, Job
from engine.cluster.simulation.strategies import Ours, Strategy

NEWCOMER = "newcomer"


@dataclass(frozen=True)
class Movement:
    """Shares of the adapters that are loaded somewhere.

    `astray`: those whose next request goes where they are not loaded, although the fleet is as it was. `joined` and `died`:
    those besides for which that is so because of one more replica, or one less.
    """

    astray: float
    joined: float
    died: float


def movement(strategy: Strategy, reports: Mapping[str, Report], now: float) -> Movement:
    """Ask for each adapter that is loaded somewhere where its next request would go: now, with one more replica, with one less.

    The requests under way are evened out in each of the three fleets, as that a replica is busy just now moves nothing for
    good. What a new replica of ours loads before it takes requests (`routing.warming`) counts as moved: it is loaded there.
    """
    under_way = sum(report.running + report.waiting for report in reports.values())
    holders: dict[str, set[str]] = {}
    ranks: dict[str, int] = {}
    for name, report in reports.items():
        ranks.update(report.ranks)
        for adapter in report.residents:
            holders.setdefault(adapter, set()).add(name)
    asks = [Job(now, adapter, ranks[adapter], prompt_tokens=1, tokens=1) for adapter in holders]

    def strays(fleet: Mapping[str, Report]) -> set[str]:
        busy = round(under_way / len(fleet))
        replicas = Replicas(Replica(name, replace(report, running=busy, waiting=0)) for name, report in fleet.items())
        return {ask.adapter for ask in asks if strategy.choose(ask, replicas, now).id not in holders[ask.adapter]}

    first, *others = reports
    newcomer = replace(reports[first], residents={}, in_use={}, ranks={})
    if isinstance(strategy, Ours):
        warmed = to_warm(NEWCOMER, newcomer, reports)
        newcomer = replace(newcomer, residents={reference.partition("@")[0]: VERSION for reference in warmed})
    astray = strays(reports)
    joined = strays({**reports, NEWCOMER: newcomer}) - astray
    died = strays({name: reports[name] for name in others}) - astray if others else set()
    count = max(1, len(holders))
    return Movement(len(astray) / count, len(joined) / count, len(died) / count)
