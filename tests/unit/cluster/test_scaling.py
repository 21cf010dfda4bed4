"""How many engines there should be: each measure, the steps, the bounds, and what Ray Serve hands to the policy."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from engine.cluster.ray.scaling import ADAPTERS, BUSY, MEMORY, TOKENS, Targets, desired, policy

LIMIT = Targets()
AT_TARGET = {
    TOKENS: LIMIT.waiting_tokens,
    MEMORY: LIMIT.kv_cache_usage,
    BUSY: LIMIT.busy,
    ADAPTERS: LIMIT.waiting_adapters,
}


@pytest.mark.parametrize(
    ("stats", "current", "wanted"),
    [
        ({}, 3, 2),  # idle: one step down
        ({TOKENS: 2000}, 4, 4),  # at its target
        ({TOKENS: 2400}, 10, 12),
        ({TOKENS: 100_000}, 4, 8),  # never more than twice as many at once
        ({MEMORY: 0.9}, 8, 9),
        ({ADAPTERS: 3}, 2, 3),
        ({BUSY: 0.6}, 4, 4),  # one fewer would be too close to the target
        ({BUSY: 0.3}, 4, 3),
        ({BUSY: 0.1, MEMORY: 0.79}, 8, 8),  # the greatest wish counts
        ({}, 1, 1),
    ],
)
def test_scaling(stats: dict[str, float], current: int, wanted: int) -> None:
    """Up by what is needed most, down slowly, never to nothing."""
    assert desired([stats] * current, current) == wanted


@pytest.mark.parametrize("measure", list(AT_TARGET))
def test_each_measure_counts_by_itself(measure: str) -> None:
    """At its target nothing changes; a little above it there is one engine more; far above, twice as many."""
    for share, wanted in ((1.0, 4), (1.01, 5), (1.4, 6), (100.0, 8)):
        assert desired([{measure: share * AT_TARGET[measure]}] * 4, 4) == wanted


@pytest.mark.parametrize("measure", list(AT_TARGET))
def test_fewer_only_with_slack(measure: str) -> None:
    """One goes only if the others then have a quarter of the target unused."""
    fits, close = (
        0.75 * 3 / 4 - 0.01,
        0.75 * 3 / 4 + 0.01,
    )  # of the target at each of four, so that three have 0.75 of it
    assert desired([{measure: fits * AT_TARGET[measure]}] * 4, 4) == 3
    assert desired([{measure: close * AT_TARGET[measure]}] * 4, 4) == 4


def test_scaling_settles() -> None:
    """Under a steady load the number of engines comes to rest, from below and from above."""
    for begin in (1, 64):
        current = begin
        for _ in range(100):
            load = 20_000 / current  # tokens that wait at each
            current = desired([{TOKENS: load, BUSY: min(1.0, 8 / current)}] * current, current, Targets())
        again = desired([{TOKENS: 20_000 / current, BUSY: min(1.0, 8 / current)}] * current, current)
        assert again == current
        assert 10 <= current <= 14


def context(metrics: dict[str, dict[str, float]] | None, current: int, least: int = 1, most: int = 10) -> Any:
    """What Ray Serve tells its policies, as far as ours reads it: metrics by name and replica."""
    return SimpleNamespace(
        aggregated_metrics=metrics,
        current_num_replicas=current,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )


def test_the_policy_reads_what_replicas_report() -> None:
    """By replica: one that waits counts as much as one that does not."""
    metrics = {TOKENS: {"a": 5000.0, "b": 0.0}, BUSY: {"a": 1.0, "b": 0.0}}
    assert policy(context(metrics, 2))[0] == 3
    assert policy(context({TOKENS: {"a": 3000.0, "b": 0.0}}, 2))[0] == 2


def test_who_has_not_reported_changes_nothing() -> None:
    """New replicas, and all of them after Serve's controller was restarted: neither idle nor busy."""
    for nothing in (None, {}):
        assert policy(context(nothing, 4))[0] == 4
    one_of_four = {TOKENS: {"a": 3000.0}, BUSY: {"a": 1.0}}
    assert policy(context(one_of_four, 4))[0] == 6  # as if the others were like it
    assert policy(context({}, 0))[0] == 1  # all have just died


def test_the_policy_keeps_to_its_bounds() -> None:
    """Those of the settings, adjusted by Serve, whatever is wished."""
    waiting, idle = {TOKENS: {"a": 1e9}}, {TOKENS: {"a": 0.0}}
    assert policy(context(waiting, 3, most=4))[0] == 4
    assert policy(context(idle, 3, least=3))[0] == 3
    assert policy(context({}, 1, least=2))[0] == 2
    assert policy(context({}, 9, most=4))[0] == 4


def test_serve_waits_before_it_follows() -> None:
    """A wish has to last, upwards and downwards, as the settings say: Serve sees to that for policies of others, too."""
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("ray")
        from ray.serve.autoscaling_policy import _apply_autoscaling_config
        from ray.serve.config import AutoscalingConfig
    config = AutoscalingConfig(min_replicas=1, max_replicas=4, upscale_delay_s=3600, downscale_delay_s=3600)
    for metrics in ({TOKENS: {"a": 1e9, "b": 1e9}}, {TOKENS: {"a": 0.0, "b": 0.0}}):
        asked = context(metrics, 2, most=4)
        asked.config, asked.target_num_replicas, asked.policy_state, asked.total_num_requests = config, 2, {}, 0
        assert policy(asked)[0] != 2
        assert _apply_autoscaling_config(policy)(asked)[0] == 2
