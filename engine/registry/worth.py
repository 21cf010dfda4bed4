"""What is worth keeping when a tier is full: what was asked for often of late, is dear to get again, and takes little room.

The value of a copy is rate x cost / size, as in GreedyDual-Size-Frequency (Cherkasova, 'Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy', HP Labs 1998). Where that ages what it holds by the value of the last victim, we
let each count decay with time, so that what was popular yesterday makes room however little is evicted meanwhile.
`python -m loadtest.bench eviction` compares it with LRU and others.
"""

from __future__ import annotations

import math
from collections import OrderedDict

HALF_LIFE_S = 300.0
_MOST_REMEMBERED = 65_536  # keys; what was not asked for longest is forgotten first


class Rates:
    """How often each key was asked for of late: counts that halve every `half_life_s`."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._decay = math.log(2) / half_life_s
        self._counts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key: count, and when it was that

    def asked(self, key: str, now: float) -> None:
        """`key` was asked for; times are seconds on any clock that does not go back."""
        self._counts[key] = (self.count(key, now) + 1.0, now)
        self._counts.move_to_end(key)
        if len(self._counts) > _MOST_REMEMBERED:
            self._counts.popitem(last=False)

    def count(self, key: str, now: float) -> float:
        """The decayed number of requests."""
        count, then = self._counts.get(key, (0.0, now))
        return count * math.exp(-self._decay * max(0.0, now - then))

    def worth(self, key: str, now: float, *, cost: float = 1.0, size: float = 1.0) -> float:
        """What keeping `key` saves for each unit of room: seconds, say, of getting it again, per byte."""
        return self.count(key, now) * cost / size
