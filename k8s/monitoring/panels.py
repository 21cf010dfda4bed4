"""What the dashboards show: one description, from which generate.py makes Grafana's JSON.

`$namespace` and `$pod` are the dashboards' own variables; every query is restricted to them.
Units are Grafana's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RATE = "$__rate_interval"
_HERE = 'namespace=~"$namespace", pod=~"$pod"'


@dataclass(frozen=True)
class Panel:
    """A chart: queries by their legend. `kind` stat shows the latest number alone."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    about: str = ""
    kind: str = "timeseries"
    stacked: bool = False
    span: int = 8


@dataclass(frozen=True)
class Board:
    """A dashboard: rows of panels by their titles. `variables` are further choices: name to the query of their values."""

    title: str
    uid: str
    about: str
    rows: dict[str, list[Panel]]
    variables: dict[str, str] = field(default_factory=dict)


def here(metric: str, where: str = "") -> str:
    """A metric of the pods that were chosen; `where` begins with a comma."""
    return f"{metric}{{{_HERE}{where}}}"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """A counter's rate, summed."""
    return f"sum {_by(by)}(rate({here(metric, where)}[{RATE}]))"


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    """A quantile of a histogram over all pods."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({here(histogram + '_bucket', where)}[{RATE}])))"


def quantiles(histogram: str, where: str = "") -> dict[str, str]:
    """The usual three."""
    return {f"p{round(100 * q)}": quantile(q, histogram, where=where) for q in (0.5, 0.95, 0.99)}


def total(gauge: str, by: str = "") -> str:
    """A gauge, summed over pods."""
    return f"sum {_by(by)}({here(gauge)})"


def share(part: str, whole: str) -> str:
    """One as a share of the other: 0 where there is only the other, nothing while there is neither."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def _by(labels: str) -> str:
    return f"by ({labels}) " if labels else ""


_GENERATE = ', method=~"Generate.*"'
_FAILED = ', code!~"OK|CANCELLED|INVALID_ARGUMENT|NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED"'

OVERVIEW = Board(
    "Loraplex / Overview",
    "loraplex-overview",
    "Is it well, and how near is its limit: rate, errors, duration and saturation of all engines together.",
    {
        "Now": [
            Panel("Engines ready", {"ready": total("loraplex_engine_ready")}, kind="stat", span=4),
            Panel("Requests/s", {"all": rate("loraplex_calls_total", where=_GENERATE)}, "reqps", kind="stat", span=4),
            Panel(
                "Failed",
                {
                    "share": share(
                        rate("loraplex_calls_total", where=_GENERATE + _FAILED),
                        rate("loraplex_calls_total", where=_GENERATE),
                    )
                },
                "percentunit",
                "Of generation calls, by our fault or for want of room; what callers did wrong is not counted.",
                "stat",
                span=4,
            ),
            Panel("TTFT p95", {"p95": quantile(0.95, "loraplex_ttft_seconds")}, "s", kind="stat", span=4),
            Panel("Tokens/s", {"generated": rate("loraplex_generated_tokens_total")}, kind="stat", span=4),
            Panel("Quarantined versions", {"versions": f"max({here('loraplex_quarantined')})"}, kind="stat", span=4),
        ],
        "Rate and errors": [
            Panel("Calls", {"{{method}}": rate("loraplex_calls_total", "method")}, "reqps"),
            Panel(
                "Calls that did not succeed",
                {"{{code}}": rate("loraplex_calls_total", "code", ', code!="OK"')},
                "reqps",
            ),
            Panel("Refused by admission", {"{{reason}}": rate("loraplex_refused_total", "reason")}, "reqps"),
        ],
        "Duration": [
            Panel("Time to first token", quantiles("loraplex_ttft_seconds"), "s"),
            Panel("Length of calls", quantiles("loraplex_call_seconds", _GENERATE), "s"),
            Panel(
                "Between tokens",
                quantiles("vllm:inter_token_latency_seconds"),
                "s",
                "By vLLM's own count, inside the engine.",
            ),
            Panel("Wait for a place", quantiles("loraplex_queue_seconds", ', outcome="admitted"'), "s"),
            Panel("Wait for the adapter", quantiles("loraplex_adapter_wait_seconds"), "s"),
            Panel(
                "Tokens/s",
                {"prompt": rate("loraplex_prompt_tokens_total"), "generated": rate("loraplex_generated_tokens_total")},
            ),
        ],
        "Saturation": [
            Panel(
                "Places and queue",
                {
                    "running": total("loraplex_running"),
                    "places": total("loraplex_max_running"),
                    "waiting": total("loraplex_waiting"),
                    "may wait": total("loraplex_max_waiting"),
                },
            ),
            Panel("KV cache in use", {"{{pod}}": here("loraplex_kv_cache_usage")}, "percentunit"),
            Panel(
                "Adapters",
                {
                    "resident": total("loraplex_resident_adapters"),
                    "slots": total("loraplex_adapter_slots"),
                    "running": total("loraplex_running_adapters"),
                    "waited for": total("loraplex_waiting_adapters"),
                    "pinned": total("loraplex_pinned_adapters"),
                },
            ),
            Panel(
                "Where adapters were when needed",
                {"{{tier}}": rate("loraplex_adapter_found_total", "tier")},
                stacked=True,
            ),
            Panel("Made way", {"{{tier}}": rate("loraplex_adapter_evictions_total", "tier")}, "ops"),
            Panel(
                "Loading an adapter",
                {"p95 from {{tier}}": quantile(0.95, "loraplex_adapter_load_seconds", "tier")},
                "s",
            ),
        ],
        "Who may call": [
            Panel("Over a limit", {"{{limit}}": rate("loraplex_quota_refused_total", "limit")}, "reqps"),
            Panel(
                "Files in force",
                {"policy": f"min({here('loraplex_policy_valid')})", "TLS": f"min({here('loraplex_tls_valid')})"},
                about="0: a file is broken, and what was there before is still in force.",
            ),
            Panel(
                "Certificate ends in",
                {"{{pod}}": f"{here('loraplex_tls_expires')} - time()"},
                "s",
            ),
            Panel("Audit lines lost", {"{{pod}}": rate("loraplex_audit_failed_total", "pod")}, "ops"),
        ],
        "Routers": [
            Panel("Calls", {"{{code}}": rate("loraplex_router_calls_total", "code")}, "reqps"),
            Panel("Length of calls", quantiles("loraplex_router_call_seconds", _GENERATE), "s"),
            Panel("Failovers", {"{{when}}": rate("loraplex_router_failovers_total", "when")}, "ops"),
            Panel(
                "Replicas that get requests", {"{{pod}}": f"sum by (pod) ({here('loraplex_router_replica_usable')})"}
            ),
            Panel(
                "Under way, by replica",
                {"{{replica}}": total("loraplex_router_replica_sent", "replica")},
                about="Even, unless adapters are popular in different measure.",
            ),
            Panel(
                "Waiting, by replica", {"{{replica}}": f"max by (replica) ({here('loraplex_router_replica_waiting')})"}
            ),
        ],
    },
)

_ADAPTER = ', adapter=~"$adapter"'
ADAPTER = Board(
    "Loraplex / Adapters",
    "loraplex-adapters",
    "How each adapter is served. The twenty busiest have a name of their own, the rest share `other`.",
    {
        "Requests": [
            Panel("Requests", {"{{adapter}}": rate("loraplex_adapter_requests_total", "adapter", _ADAPTER)}, "reqps"),
            Panel(
                "Not OK",
                {
                    "{{adapter}} {{code}}": rate(
                        "loraplex_adapter_requests_total", "adapter, code", _ADAPTER + ', code!="OK"'
                    )
                },
                "reqps",
            ),
            Panel("Tokens/s", {"{{adapter}}": rate("loraplex_adapter_generated_tokens_total", "adapter", _ADAPTER)}),
            Panel(
                "TTFT p95", {"{{adapter}}": quantile(0.95, "loraplex_adapter_ttft_seconds", "adapter", _ADAPTER)}, "s"
            ),
            Panel(
                "Wait for a place, p95",
                {"{{adapter}}": quantile(0.95, "loraplex_adapter_queue_seconds", "adapter", _ADAPTER)},
                "s",
            ),
        ],
        "Residency": [
            Panel(
                "Found in the engine",
                {
                    "{{adapter}}": share(
                        rate("loraplex_adapter_hits_total", "adapter", _ADAPTER + ', hit="yes"'),
                        rate("loraplex_adapter_hits_total", "adapter", _ADAPTER),
                    )
                },
                "percentunit",
                "A low share with many requests: more slots (max_resident), or a pin.",
            ),
            Panel(
                "Wait when it was not, p95",
                {"{{adapter}}": quantile(0.95, "loraplex_adapter_load_wait_seconds", "adapter", _ADAPTER)},
                "s",
            ),
            Panel(
                "Loading it, mean",
                {
                    "{{adapter}}": share(
                        rate("loraplex_adapter_loaded_seconds_sum", "adapter", _ADAPTER),
                        rate("loraplex_adapter_loaded_seconds_count", "adapter", _ADAPTER),
                    )
                },
                "s",
            ),
            Panel(
                "Left", {"{{adapter}} {{why}}": rate("loraplex_adapter_left_total", "adapter, why", _ADAPTER)}, "ops"
            ),
        ],
        "Canaries and shadows": [
            Panel(
                "Canary: requests",
                {"{{adapter}} {{side}}": rate("loraplex_canary_requests_total", "adapter, side", _ADAPTER)},
                "reqps",
            ),
            Panel(
                "Canary: not OK",
                {
                    "{{adapter}} {{side}}": share(
                        rate("loraplex_canary_requests_total", "adapter, side", _ADAPTER + ', code!="OK"'),
                        rate("loraplex_canary_requests_total", "adapter, side", _ADAPTER),
                    )
                },
                "percentunit",
            ),
            Panel(
                "Canary: TTFT p95",
                {"{{adapter}} {{side}}": quantile(0.95, "loraplex_canary_ttft_seconds", "adapter, side", _ADAPTER)},
                "s",
            ),
            Panel(
                "Shadow: copies",
                {"{{adapter}} {{outcome}}": rate("loraplex_shadow_copies_total", "adapter, outcome", _ADAPTER)},
                "ops",
            ),
        ],
    },
    {"adapter": "label_values(loraplex_adapter_requests_total, adapter)"},
)

_TENANT = ', tenant=~"$tenant"'
TENANT = Board(
    "Loraplex / Tenants",
    "loraplex-tenants",
    "Who asks, what they get, and whether shares are fair. The twenty busiest have a name, the rest share `other`.",
    {
        "What they get": [
            Panel("Requests", {"{{tenant}}": rate("loraplex_tenant_requests_total", "tenant", _TENANT)}, "reqps"),
            Panel(
                "Not OK",
                {
                    "{{tenant}} {{code}}": rate(
                        "loraplex_tenant_requests_total", "tenant, code", _TENANT + ', code!="OK"'
                    )
                },
                "reqps",
                "RESOURCE_EXHAUSTED is their own quota, UNAVAILABLE our capacity.",
            ),
            Panel(
                "Over a limit of theirs",
                {"{{tenant}} {{limit}}": rate("loraplex_quota_refused_total", "tenant, limit", _TENANT)},
                "reqps",
            ),
            Panel("TTFT p95", {"{{tenant}}": quantile(0.95, "loraplex_tenant_ttft_seconds", "tenant", _TENANT)}, "s"),
            Panel(
                "Tokens/s",
                {"{{tenant}} {{kind}}": rate("loraplex_tenant_tokens_total", "tenant, kind", _TENANT)},
            ),
            Panel(
                "Service",
                {"{{tenant}}": rate("loraplex_tenant_service_total", "tenant", _TENANT)},
                about="In the unit of fair shares: 1 for a prompt's token, 2 for an answer's.",
                stacked=True,
            ),
            Panel(
                "Share of all service",
                {
                    "{{tenant}}": f"{rate('loraplex_tenant_service_total', 'tenant', _TENANT)} / ignoring(tenant) group_left() "
                    f"({rate('loraplex_tenant_service_total')} > 0)"
                },
                "percentunit",
                "While all have requests waiting, it follows their weights.",
                stacked=True,
            ),
        ],
    },
    {"tenant": "label_values(loraplex_tenant_requests_total, tenant)"},
)

NODE = Board(
    "Loraplex / Nodes",
    "loraplex-nodes",
    "One server or router beside the other: which one is different?",
    {
        "Engine": [
            Panel("Ready", {"{{pod}}": here("loraplex_engine_ready")}),
            Panel("Running", {"{{pod}}": here("loraplex_running")}),
            Panel("Waiting", {"{{pod}}": here("loraplex_waiting")}),
            Panel("Tokens that wait", {"{{pod}}": here("loraplex_waiting_tokens")}),
            Panel("KV cache in use", {"{{pod}}": here("loraplex_kv_cache_usage")}, "percentunit"),
            Panel("Tokens/s", {"{{pod}}": rate("loraplex_generated_tokens_total", "pod")}),
            Panel(
                "Engine restarts",
                {"{{pod}}": f"increase({here('loraplex_engine_restart_seconds_count')}[1h])"},
                about="In an hour.",
            ),
            Panel("Draining", {"{{pod}}": here("loraplex_draining")}),
            Panel("Registry readable", {"{{pod}}": here("loraplex_registry_readable")}),
        ],
        "vLLM": [
            Panel("Tokens a step, p50", {"{{pod}}": quantile(0.5, "vllm:iteration_tokens_total", "pod")}),
            Panel(
                "Prefix cache hits",
                {
                    "{{pod}}": share(
                        rate("vllm:prefix_cache_hits_total", "pod"), rate("vllm:prefix_cache_queries_total", "pod")
                    )
                },
                "percentunit",
            ),
            Panel("Preemptions", {"{{pod}}": rate("vllm:num_preemptions_total", "pod")}, "ops"),
            Panel(
                "Prompt tokens found in the cache",
                {
                    "{{pod}}": share(
                        rate("loraplex_cached_prompt_tokens_total", "pod"), rate("loraplex_prompt_tokens_total", "pod")
                    )
                },
                "percentunit",
            ),
            Panel("Prefill p95", {"{{pod}}": quantile(0.95, "vllm:request_prefill_time_seconds", "pod")}, "s"),
            Panel("Decode p95", {"{{pod}}": quantile(0.95, "vllm:request_decode_time_seconds", "pod")}, "s"),
        ],
        "Process": [
            Panel("Event loop late, p99", {"{{pod}}": quantile(0.99, "loraplex_loop_lag_seconds", "pod")}, "s"),
            Panel(
                "CPU",
                {"{{pod}}": f"rate({here('process_cpu_seconds_total')}[{RATE}])"},
                about="Cores of the front end's process.",
            ),
            Panel("Memory", {"{{pod}}": here("process_resident_memory_bytes")}, "bytes"),
            Panel("Open files", {"{{pod}}": f"{here('process_open_fds')} / {here('process_max_fds')}"}, "percentunit"),
        ],
    },
)

BOARDS = (OVERVIEW, ADAPTER, TENANT, NODE)
