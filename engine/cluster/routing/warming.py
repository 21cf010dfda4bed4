"""What a new replica loads before it takes requests: what the others have pinned, and the adapters that will be its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine.cluster.routing.choice import Ask
from engine.cluster.routing.rendezvous import Rendezvous
from engine.cluster.routing.replicas import Report


def to_pin(report: Report, others: Mapping[str, Report]) -> list[str]:
    """References that replicas of its base keep: pins are meant for all, and each one has them in its own memory only."""
    return sorted({ref for other in others.values() if other.base == report.base for ref in other.pinned})


def to_warm(own: str, report: Report, others: Mapping[str, Report]) -> list[str]:
    """References of resident adapters that prefer `own` to all `others` of its base, the most used first.

    They are as many as fit beside what it pins. Of an adapter with several resident versions all are taken, as
    an alias may name any of them.
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
    pinned = to_pin(report, others)
    refs = [f"{name}@{version}" for name in mine for version in sorted(versions[name])]
    return [ref for ref in refs if ref not in pinned][: max(0, report.slots - len(pinned))]
