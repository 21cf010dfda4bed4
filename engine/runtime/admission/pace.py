"""How fast the engine has been of late: whether a request can still be answered before its deadline, and when to come back."""

from __future__ import annotations

from engine.runtime.admission.tenants import ANSWER_TOKEN_COST, PROMPT_TOKEN_COST
from engine.runtime.admission.tickets import Asked, Ticket

_FEWEST = 8  # requests from which anything can be told
_MEMORY = 0.05  # weight of the latest request: about the last twenty count


class Pace:
    """Means over the latest requests: how long they held their places, how many tokens an answer had and how that varies.

    `cost` is what one takes of its tenant's share, in the unit of engine.runtime.admission.tenants; 0 when unknown.
    """

    def __init__(self, max_running: int) -> None:
        self.cost = 0.0
        self._max_running = max_running
        self._seen = 0
        self._held_s = 0.0
        self._tokens = 0.0
        self._deviation = 0.0

    def finished(self, ticket: Ticket, now: float) -> None:
        """Learn from a request that ran; one without a token (its adapter failed to load, say) tells nothing."""
        if not ticket.produced:
            return
        self._seen += 1
        memory = max(_MEMORY, 1 / self._seen)
        cost = PROMPT_TOKEN_COST * ticket.asked.prompt_tokens * ticket.places + ANSWER_TOKEN_COST * ticket.produced
        self.cost += memory * (cost - self.cost)
        self._held_s += memory * (now - ticket.started - self._held_s)
        error = ticket.produced / ticket.places - self._tokens
        self._tokens += memory * error
        self._deviation += memory * (abs(error) - self._deviation)

    @property
    def mean_answer_s(self) -> float:
        """How long answers have run of late. 0 when unknown."""
        return self._held_s if self._seen >= _FEWEST else 0.0

    def wait_s(self, places: float) -> float:
        """How long it takes until so many places have become free: each is held as long as of late. 0 when unknown."""
        return self.mean_answer_s * places / self._max_running

    def answer_s(self, asked: Asked) -> float:
        """How long a request will run if its answer is as long as the longer ones of late. 0 when unknown.

        The mean alone would be late for half of them: work for nothing, when the engine is needed most. Twice the mean
        deviation above it is the margin that TCP's retransmission timer began with (Jacobson, 1988).
        """
        if self._seen < _FEWEST:
            return 0.0
        tokens = max(asked.min_tokens, min(asked.max_tokens, self._tokens + 2 * self._deviation))
        return self._held_s * tokens / self._tokens
