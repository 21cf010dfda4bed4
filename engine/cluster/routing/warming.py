"""What a new replica loads before it takes requests: the adapters in use that will be its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine.cluster.routing.choice import Ask
from engine.cluster.routing.rendezvous import Rendezvous
from engine.cluster.routing.replicas import Report


def to_warm(own: str, report: Report, others: Mapping[str, Report]) -> list[str]:
    """References of resident adapters that prefer `own` to all `others` of its base, the most used first; as many as fit.

    Of an adapter with several resident versions all are taken: an alias may name any of them.
    """
    same = {name: other for name, other in others.items() if other.base == report.base and name != own}
    ring = Rendezvous({name: other.places for name, other in (same | {own: report}).items()})
    used: Counter[str] = Counter()
    versions: dict[str, set[str]] = {}
    for other in same.values():
        used.update(other.in_use)
        for name, held in other.residents.items():
            versions.setdefault(name, set()).update(held)
    mine = [name for name in versions if ring.first(Ask(name).key)[0] == own]
    mine.sort(key=lambda name: (-used[name], name))
    return [f"{name}@{version}" for name in mine for version in sorted(versions[name])][: report.slots]
