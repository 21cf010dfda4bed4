"""What sending a request to a replica costs: an estimate, in seconds, of the time until its first token.

Three parts: the wait for a place, the slower steps of a fuller batch, and the adapter, if it is not there. The estimate
only has to rank replicas, so what is the same everywhere (the prompt's own prefill, say) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cluster.routing.replicas import Replica

_LORA_SHARE = 1 / 128  # what a rank adds to a step's work; only its order of magnitude matters


@dataclass(frozen=True)
class Costs:
    """The times that estimates are made of, in seconds.

    `hold_s` is how long a request holds its place, `step_s` a step of a full batch, `load_s` and `load_rank_s` what loading an
    adapter takes: a constant, and a part for each rank, as its bytes are proportional to it. `prefill_s` is what a cached
    prefix saves. `turn_s` is how long an adapter waits for a slot when requests use all of them.
    """

    hold_s: float = 2.0
    step_s: float = 0.05
    load_s: float = 0.05
    load_rank_s: float = 0.002
    prefill_s: float = 0.2
    turn_s: float = 2.0

    def queue(self, replica: Replica, work: float = 1.0) -> float:
        """The wait for a place, and what the others in the batch cost."""
        places = replica.report.places
        over = max(0.0, replica.active + work - places)
        return (self.hold_s * over + self.step_s * replica.active) / places

    def load(self, rank: int) -> float:
        """Loading an adapter of this rank."""
        return self.load_s + self.load_rank_s * rank

    def adapter(self, replica: Replica, name: str, version: str, rank: int) -> float:
        """The wait for the adapter: none if it is there, its load if it is not, and a turn if all slots are in use."""
        if replica.holds(name, version):
            return 0.0
        return self.load(rank) + (self.turn_s if replica.slots_used >= replica.report.slots else 0.0)


def work_of(rank: int) -> float:
    """How much of a place's work a request with an adapter of this rank is, in requests to the base model."""
    return 1.0 + rank * _LORA_SHARE
