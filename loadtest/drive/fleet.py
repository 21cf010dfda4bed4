"""The adapters of servers that the tool starts itself: the given folders, and markers written for the cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadtest.drive.markers import write_marker
from loadtest.errors import BadInput
from loadtest.plan.scenario import Case


def fleet(adapters: Sequence[Path], cases: Sequence[Case], folder: Path) -> dict[str, Path]:
    """Folders of adapters by name; the markers are written into `folder`. Raises BadInput where they cannot be."""
    found = {_name(one): one for one in adapters}
    if len(found) < len(adapters):
        raise BadInput(
            "two of the adapters have the same name", "An adapter is called as its folder, or as v1's parent."
        )
    ranks = max((case.server.ranks for case in cases), key=len, default=(8,))
    markers = max((_markers(case, len(found)) for case in cases), default=0)
    if markers and not adapters:
        raise BadInput("publishing needs an adapter to take shapes from", "Give --adapter FOLDER.")
    for number in range(markers):
        name = _marker(number)
        found[name] = folder / name
        write_marker(adapters[0], found[name], number, ranks[number % len(ranks)])
    return found


def own_adapters(case: Case, adapters: Sequence[Path]) -> Case:
    """The case with "all" its adapters by name: those given and its own markers, not what other cases of the run need."""
    if case.workload.adapters != "all" or case.workload.base_share >= 1:
        return case
    names = (*map(_name, adapters), *(_marker(number) for number in range(case.server.markers)))
    if not names:
        return case
    return case.model_copy(update={"workload": case.workload.model_copy(update={"adapters": names})})


def _markers(case: Case, given: int) -> int:
    """How many markers the case needs; one that asks fewer adapters than its scenario has needs fewer."""
    wanted = case.workload.adapters
    return min(case.server.markers, max(0, wanted - given)) if isinstance(wanted, int) else case.server.markers


def _name(folder: Path) -> str:
    return folder.parent.name if folder.name.startswith("v") else folder.name


def _marker(number: int) -> str:
    return f"load-{number + 1:03}"
