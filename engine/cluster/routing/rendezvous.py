"""Rendezvous hashing: for every key an order of preference among the nodes.

Each node draws a number from key and node alone, and the greatest goes first (Thaler & Ravishankar, 1998; with weights,
Schindelhauer & Schomaker, 2005). So whoever knows the same nodes prefers the same ones, a node that leaves moves its own
keys only, and a node that joins takes its share from all others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_KEPT = 65_536  # orders that are remembered
_FIRST = 16  # of each order: more than anybody asks for, unless the fleet is full


class Rendezvous:
    """The orders over `nodes`, which maps their names to weights: a node of weight 2 comes first twice as often."""

    def __init__(self, nodes: Mapping[str, float]) -> None:
        self.names = tuple(sorted(nodes))
        self._hashes = np.array([_hash(name) for name in self.names], np.uint64)
        self._weights = np.array([max(nodes[name], 1e-9) for name in self.names])
        self._orders: dict[int, tuple[str, ...]] = {}  # by the key's hash: keys hold beginnings of prompts

    def first(self, key: str) -> tuple[str, ...]:
        """The names that come first for `key`: sixteen, or all if there are fewer."""
        number = _hash(key)
        order = self._orders.get(number)
        if order is None:
            if len(self._orders) >= _KEPT:
                self._orders.clear()
            order = self._orders[number] = self._order(number)[:_FIRST]
        return order

    def order(self, key: str) -> tuple[str, ...]:
        """All names, the preferred one first."""
        return self._order(_hash(key))

    def _order(self, number: int) -> tuple[str, ...]:
        mixed = _mix(self._hashes ^ np.uint64(number))
        unit = (mixed >> np.uint64(11)).astype(np.float64) / 2**53  # in [0, 1), 53 bits as in random.random
        scores = -self._weights / np.log(np.maximum(unit, 2.0**-53))
        return tuple(self.names[at] for at in np.argsort(-scores, kind="stable"))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014): every bit of the input changes half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
