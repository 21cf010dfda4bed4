"""A shadow: a version that is asked a copy of a share of an adapter's requests, as the alias log says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.registry.aliases import standing
from engine.registry.manifest import AliasChange
from engine.registry.names import SHADOW


@dataclass(frozen=True)
class Shadow:
    """`version` is asked again what a share `sample`, 0 to 1, of the requests for `name` alone asked the current version.

    `sequence` is the number of the move that began it.
    """

    name: str
    version: str
    sample: float
    sequence: int = field(default=0, compare=False)

    def draws(self) -> bool:
        """Whether the next request is copied: chance decides, for nobody sees who answers."""
        return random.random() < self.sample  # noqa: S311 - no secret hangs on it


def shadow_now(name: str, history: Sequence[AliasChange]) -> Shadow | None:
    """Replay the log: the shadow that stands, if any."""
    move = standing(SHADOW, history)
    if move is None or not move.version or not move.split:
        return None
    return Shadow(name, move.version, move.split.weight, move.sequence)
