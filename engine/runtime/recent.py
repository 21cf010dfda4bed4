"""The latest values of something, for medians and the like: a bounded window, so that old times do not colour new ones."""

from __future__ import annotations

import math
from collections import deque

_MOST = 1000


class Recent:
    """Up to 1,000 values, the latest."""

    def __init__(self, most: int = _MOST) -> None:
        self.values: deque[float] = deque(maxlen=most)

    def __len__(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        """One more; the oldest makes room."""
        self.values.append(value)

    def percentile(self, percent: float) -> float | None:
        """The least value that `percent` of 100 values do not exceed (nearest rank); None without values."""
        if not self.values:
            return None
        ordered = sorted(self.values)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
