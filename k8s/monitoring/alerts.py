"""What somebody is woken for, or told in the morning: one description, from which generate.py makes the PrometheusRule.

Each alert has a runbook in docs/runbooks. `page` is for what callers feel now; `ticket` for what will hurt later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Alert:
    """`query` gives a series for each thing that is wrong; it has to be so for `lasting`."""

    name: str
    query: str
    lasting: str
    severity: Literal["page", "ticket"]
    summary: str


def _quantile(q: float, histogram: str, by: str) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({histogram}_bucket[10m])))"


_GENERATE = 'method=~"Generate.*"'
_ROOM = 'reason=~"OVERLOADED|WAITED_TOO_LONG|DEADLINE_UNREACHABLE"'
_OURS = 'code=~"UNAVAILABLE|INTERNAL|UNKNOWN|DATA_LOSS"'


def _burn(window: str, times: float) -> str:
    """The error budget of 99.5 % is spent so many times too fast (https://sre.google/workbook/alerting-on-slos)."""
    failed = f"sum by (namespace) (rate(loraplex_calls_total{{{_GENERATE}, {_OURS}}}[{window}]))"
    return f"{failed} / sum by (namespace) (rate(loraplex_calls_total{{{_GENERATE}}}[{window}])) > {times} * 0.005"


ALERTS = (
    Alert(
        "LoraplexErrorBudgetBurns",
        f"({_burn('5m', 14.4)}) and ({_burn('1h', 14.4)})",
        "2m",
        "page",
        "Generation calls fail so fast that a month's error budget lasts two days.",
    ),
    Alert(
        "LoraplexErrorBudgetBurnsSlowly",
        f"({_burn('30m', 3)}) and ({_burn('6h', 3)})",
        "15m",
        "ticket",
        "Generation calls fail more often than the error budget allows.",
    ),
    Alert(
        "LoraplexNoEngine",
        "sum by (namespace) (loraplex_engine_ready) == 0 or absent(loraplex_engine_ready)",
        "1m",
        "page",
        "No engine can generate.",
    ),
    Alert(
        "LoraplexEngineDown",
        "loraplex_engine_ready == 0 and loraplex_draining == 0",
        "5m",
        "ticket",
        "The engine of {{ $labels.pod }} does not come back.",
    ),
    Alert(
        "LoraplexEngineRestarts",
        "increase(loraplex_engine_restart_seconds_count[30m]) > 2",
        "0m",
        "ticket",
        "The engine of {{ $labels.pod }} has died {{ $value }} times in half an hour.",
    ),
    Alert(
        "LoraplexSlowFirstToken",
        f"{_quantile(0.95, 'loraplex_ttft_seconds', 'namespace')} > 5",
        "10m",
        "page",
        "One request in twenty waits longer than 5 s for its first token.",
    ),
    Alert(
        "LoraplexQueueFull",
        "sum by (namespace) (loraplex_waiting) / sum by (namespace) (loraplex_max_waiting) > 0.8",
        "5m",
        "page",
        "The queues are nearly full: requests will be refused.",
    ),
    Alert(
        "LoraplexRefusesForCapacity",
        f"sum by (namespace) (rate(loraplex_refused_total{{{_ROOM}}}[10m])) > 0.1",
        "10m",
        "ticket",
        "Requests are refused for want of room.",
    ),
    Alert(
        "LoraplexKvCacheFull",
        "loraplex_kv_cache_usage > 0.95",
        "15m",
        "ticket",
        "The KV cache of {{ $labels.pod }} is full: vLLM preempts requests.",
    ),
    Alert(
        "LoraplexAdaptersThrash",
        'sum by (namespace) (rate(loraplex_adapter_hits_total{hit="no"}[15m]))'
        " / sum by (namespace) (rate(loraplex_adapter_hits_total[15m])) > 0.3",
        "30m",
        "ticket",
        "Three requests in ten wait for their adapter to be loaded: too few slots for this traffic.",
    ),
    Alert(
        "LoraplexQuarantine",
        "loraplex_quarantined > 0",
        "0m",
        "ticket",
        "An adapter version gave numbers that are not finite, and is out of service on {{ $labels.pod }}.",
    ),
    Alert(
        "LoraplexRegistryUnreadable",
        "loraplex_registry_readable == 0",
        "5m",
        "ticket",
        "{{ $labels.pod }} cannot read the registry, or not all of it: what it knows is still served.",
    ),
    Alert(
        "LoraplexLoopLate",
        f"{_quantile(0.99, 'loraplex_loop_lag_seconds', 'pod')} > 0.1",
        "10m",
        "ticket",
        "The front end of {{ $labels.pod }} is late: every stream stutters.",
    ),
    Alert(
        "LoraplexFewFilesLeft",
        "process_open_fds / process_max_fds > 0.8",
        "10m",
        "ticket",
        "{{ $labels.pod }} has opened most of the files that it may.",
    ),
    Alert(
        "LoraplexReplicaUnusable",
        "max by (namespace, replica) (loraplex_router_replica_usable) == 0",
        "10m",
        "ticket",
        "No router sends requests to {{ $labels.replica }}.",
    ),
    Alert(
        "LoraplexFailovers",
        "sum by (namespace) (rate(loraplex_router_failovers_total[15m])) > 0.05",
        "15m",
        "ticket",
        "Requests fail on one replica and go on at another: nobody noticed yet.",
    ),
    Alert(
        "LoraplexPolicyBroken",
        "loraplex_policy_valid == 0 or loraplex_tls_valid == 0",
        "5m",
        "ticket",
        "The policy or TLS files of {{ $labels.pod }} are broken: what was there before is still in force.",
    ),
    Alert(
        "LoraplexCertificateExpires",
        "loraplex_tls_expires - time() < 7 * 86400",
        "10m",
        "ticket",
        "The certificate of {{ $labels.pod }} ends within a week.",
    ),
    Alert(
        "LoraplexAuditFails",
        "increase(loraplex_audit_failed_total[15m]) > 0",
        "0m",
        "page",
        "{{ $labels.pod }} cannot write its audit log: acts go unrecorded.",
    ),
)
