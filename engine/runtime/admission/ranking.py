"""An order of items whose keys change all the time, in logarithmic time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_SLACK = 32  # out-of-date entries that are not worth a tidying-up


class Ranking(Generic[T]):
    """Items, least key first. `put` an item again when its key may have fallen; that it rose is noticed by itself."""

    def __init__(self, key: Callable[[T], Any]) -> None:
        self._key = key
        self._heap: list[tuple[Any, int, T]] = []
        self._entries: dict[T, tuple[Any, int, T]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def put(self, item: T) -> None:
        """Add the item, or move it to where its key is now."""
        key = self._key(item)
        present = self._entries.get(item)
        if present is not None and present[0] == key:
            return
        entry = self._entries[item] = (key, next(self._numbers), item)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def discard(self, item: T) -> None:
        """Take the item out, if it is in."""
        self._entries.pop(item, None)

    def first(self) -> T | None:
        """The item with the least key."""
        heap = self._heap
        while heap:
            entry = heap[0]
            key, number, item = entry
            if self._entries.get(item) is not entry:
                heapq.heappop(heap)
            elif (now := self._key(item)) > key:
                fresh = self._entries[item] = (now, number, item)
                heapq.heapreplace(heap, fresh)
            else:
                return item
        return None

    def within(self, bound: Any) -> Iterator[T]:
        """The items whose keys are `bound` or less, in no order, one at a time."""
        places = [0]
        while places:
            place = places.pop()
            if place >= len(self._heap) or self._heap[place][0] > bound:
                continue
            entry = self._heap[place]
            places += (2 * place + 1, 2 * place + 2)
            if self._entries.get(entry[2]) is entry and self._key(entry[2]) <= bound:
                yield entry[2]
