"""The adapters of servers that the tool starts itself: the given folders, and markers written for the cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadtest.drive.markers import write_marker
from loadtest.errors import BadInput
from loadtest.plan.scenario import Case


def fleet(adapters: Sequence[Path], cases: Sequence[Case], folder: Path) -> dict[str, Path]:
    """Folders of adapters by name; the markers are written into `folder`. Raises BadInput where they cannot be."""
    found = {(one.parent.name if one.name.startswith("v") else one.name): one for one in adapters}
    if len(found) < len(adapters):
        raise BadInput(
            "two of the adapters have the same name", "An adapter is called as its folder, or as v1's parent."
        )
    ranks = max((case.server.ranks for case in cases), key=len, default=(8,))
    markers = max((case.server.markers for case in cases), default=0)
    if markers and not adapters:
        raise BadInput("publishing needs an adapter to take shapes from", "Give --adapter FOLDER.")
    for number in range(markers):
        name = f"load-{number + 1:03}"
        found[name] = folder / name
        write_marker(adapters[0], found[name], number, ranks[number % len(ranks)])
    return found
