"""How many engines there should be: by tokens that wait, memory in use, and adapters that wait for a slot.

Requests do not pass through Ray, so its own counts see none of them; the replicas report these instead. Pure but for the last
function, which is what Ray Serve calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKENS, MEMORY, ADAPTERS, BUSY = "waiting_tokens", "kv_cache_usage", "waiting_adapters", "busy"


@dataclass(frozen=True)
class Targets:
    """What one engine should have, on the mean: above it there are too few of them.

    Tokens that wait (a few seconds' work), the share of the KV cache and of the places in use, adapters that wait for a slot.
    """

    waiting_tokens: float = 2000.0
    kv_cache_usage: float = 0.8
    busy: float = 0.8
    waiting_adapters: float = 2.0
    slack: float = 0.25  # scale down only if that leaves so much of each target unused
    fastest: float = 2.0  # the most that one step multiplies by


def desired(stats: Sequence[Mapping[str, float]], current: int, targets: Targets | None = None) -> int:
    """How many engines there should be instead of `current`; `stats` are the reports of those that have reported.

    Each measure asks for as many as bring it to its target, as Kubernetes' autoscaler does; the greatest wish counts.
    """
    targets = targets or Targets()
    if not stats or current < 1:
        return max(current, 1)
    needs = [
        _mean(stats, name) / target
        for name, target in (
            (TOKENS, targets.waiting_tokens),
            (MEMORY, targets.kv_cache_usage),
            (BUSY, targets.busy),
            (ADAPTERS, targets.waiting_adapters),
        )
    ]
    need = max(needs)
    if need > 1:
        return max(current + 1, math.ceil(current * min(need, targets.fastest)))
    fewer = max(1, math.ceil(current * need / (1 - targets.slack)))
    return min(current, max(fewer, current - 1))


def _mean(stats: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(one.get(name, 0.0) for one in stats) / len(stats)


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's custom policy: from its AutoscalingContext to the number of replicas."""
    by_replica: dict[Any, dict[str, float]] = {}
    for name, values in (context.aggregated_metrics or {}).items():
        for replica, value in values.items():
            by_replica.setdefault(replica, {})[name] = value
    wanted = desired(list(by_replica.values()), context.current_num_replicas)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, wanted)), {}
