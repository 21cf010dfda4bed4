"""Which version may answer a name, and since when: the target's adapters, and every alias move during the run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Move:
    """An alias was asked to move at `begun`, and the server confirmed it at `done` (time.monotonic)."""

    name: str
    alias: str
    version: str
    begun: float
    done: float


@dataclass
class Aliases:
    """Digests by "name@version", and what each "name@alias" meant over time."""

    digests: dict[str, str] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)

    def versions(self, ref: str, sent: float, answered: float) -> set[str]:
        """The "name@version" that may answer a request for `ref` sent and first answered at these times.

        A name is resolved once, somewhere between the two; while a move is not confirmed, either side of it is right.
        """
        name, _, alias = ref.partition("@")
        alias = alias or "current"
        if f"{name}@{alias}" in self.digests:
            return {f"{name}@{alias}"}
        allowed = {self.initial.get(f"{name}@{alias}", "")}
        for move in self.moves:
            if (move.name, move.alias) != (name, alias) or move.begun > answered:
                continue
            if move.done < sent:
                allowed = {move.version}
            else:
                allowed.add(move.version)
        return {f"{name}@{version}" for version in allowed if version}
