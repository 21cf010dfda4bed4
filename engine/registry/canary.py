"""A canary: the share of an adapter's bare name that another version answers, as the alias log says."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from engine.registry.aliases import standing
from engine.registry.manifest import AliasChange, Trial
from engine.registry.names import CANARY


@dataclass(frozen=True)
class Canary:
    """`version` answers a share `weight`, 0 to 1, of what is asked of `name` alone; a `trial` says how it is judged.

    `sequence` is the number of the move that began it, and `began` the time of that, by the clock of who wrote it.
    """

    name: str
    version: str
    weight: float
    trial: Trial | None = None
    sequence: int = field(default=0, compare=False)
    began: datetime = field(default=datetime.min.replace(tzinfo=UTC), compare=False)

    def takes(self, key: str) -> bool:
        """Whether the canary answers a request with this routing key; without a key, chance decides.

        A key's place between 0 and 1 depends on the key and the canary alone: every server decides alike, a greater
        weight only adds keys, and the next canary is tried on other keys.
        """
        return (self._place(key) if key else random.random()) < self.weight  # noqa: S311 - no secret hangs on it

    def _place(self, key: str) -> float:
        digest = hashlib.blake2b(f"{self.name}@{self.version}\n{key}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float holds, so it is below 1


def canary_now(name: str, history: Sequence[AliasChange]) -> Canary | None:
    """Replay the log: the canary that stands, if any."""
    move = standing(CANARY, history)
    if move is None or not move.version or not move.split:
        return None
    return Canary(name, move.version, move.split.weight, move.split.trial, move.sequence, move.created_at)
