"""A canary: the share of an adapter's bare name that another version answers, as the alias log says."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from engine.registry.manifest import AliasChange
from engine.registry.names import CANARY, CURRENT


@dataclass(frozen=True)
class Canary:
    """`version` answers a share `weight`, 0 to 1, of what is asked of `name` alone."""

    name: str
    version: str
    weight: float

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
    """Replay the log: the canary that stands, if any. Whatever moves "current" or "canary" ends it.

    So a promotion or rollback of "current" never leaves traffic on a canary that was compared with something else.
    """
    for change in reversed(history):
        if change.alias == CANARY and change.version and change.split:
            return Canary(name, change.version, change.split.weight)
        if change.alias in (CANARY, CURRENT):
            return None
    return None
