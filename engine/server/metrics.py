"""Prometheus metrics. Labels are methods, codes, reasons, the busiest tenants and adapters, so their number is bounded."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from engine.registry.catalog import Catalog, InEngine
from engine.runtime import shadow
from engine.runtime.admission import Admission
from engine.runtime.admission.gate import Outcome
from engine.runtime.admission.tenants import ANSWER_TOKEN_COST, PROMPT_TOKEN_COST
from engine.runtime.requests import Answer, Ending
from engine.runtime.residency import Residency, Tier
from engine.runtime.supervised import Supervised
from engine.server.identity.tls import Tls
from engine.server.process import LoopLag, OtherMetrics

BASE = "base"  # the label of requests without an adapter
_FEW_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)  # of what has many labels
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Everything that this server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._calls = Counter("loraplex_calls", "gRPC calls, by method and status.", ["method", "code"], registry=r)
        self._seconds = Histogram("loraplex_call_seconds", "Length of calls.", ["method"], buckets=SECONDS, registry=r)
        self._ttft = Histogram("loraplex_ttft_seconds", "Time to first token.", buckets=SECONDS, registry=r)
        self._queue = Histogram(
            "loraplex_queue_seconds", "Wait for a place, by its end.", ["outcome"], buckets=SECONDS, registry=r
        )
        self._refused = Counter("loraplex_refused", "Requests that admission refused.", ["reason"], registry=r)
        self._tenant_tokens = Counter(
            "loraplex_tenant_tokens", "Prompt and generated tokens, by tenant.", ["tenant", "kind"], registry=r
        )
        self._service = Counter(
            "loraplex_tenant_service",
            "Service by tenant, in the unit of its fair share: 1 for a prompt's token, 2 for an answer's.",
            ["tenant"],
            registry=r,
        )
        self._tenant_requests = Counter(
            "loraplex_tenant_requests",
            "Requests that have ended, by tenant and status.",
            ["tenant", "code"],
            registry=r,
        )
        self._tenant_ttft = Histogram(
            "loraplex_tenant_ttft_seconds",
            "Time to first token, by tenant.",
            ["tenant"],
            buckets=_FEW_SECONDS,
            registry=r,
        )
        self._tenants = Labels(most=20)
        self._split = Counter(
            "loraplex_canary_requests",
            "Requests that a canary shared out, by adapter, side and status.",
            ["adapter", "side", "code"],
            registry=r,
        )
        self._split_ttft = Histogram(
            "loraplex_canary_ttft_seconds",
            "Time to first token of requests that a canary shared out.",
            ["adapter", "side"],
            buckets=SECONDS,
            registry=r,
        )
        self._canaries = Labels(most=20)
        self._copies = Counter(
            "loraplex_shadow_copies",
            "Requests that were drawn for a shadow, by adapter and what became of the copy.",
            ["adapter", "outcome"],
            registry=r,
        )
        self._by_adapter = ByAdapter(r)
        self._wait = Histogram("loraplex_adapter_wait_seconds", "Wait for the adapter.", buckets=SECONDS, registry=r)
        self._prompt = Counter("loraplex_prompt_tokens", "Prompt tokens.", registry=r)
        self._cached = Counter(
            "loraplex_cached_prompt_tokens", "Prompt tokens whose keys and values were still there.", registry=r
        )
        self._generated = Counter("loraplex_generated_tokens", "Generated tokens.", registry=r)
        self._loads = Histogram(
            "loraplex_adapter_load_seconds",
            "Loading an adapter, and probing it the first time, by the tier that had it.",
            ["tier"],
            buckets=SECONDS,
            registry=r,
        )
        self._found = Counter(
            "loraplex_adapter_found", "Needed adapters, by the tier that had them.", ["tier"], registry=r
        )
        self._evictions = Counter(
            "loraplex_adapter_evictions", "Adapters that made way, by tier.", ["tier"], registry=r
        )
        self._restarts = Histogram(
            "loraplex_engine_restart_seconds",
            "From an engine's death until the next one is ready.",
            buckets=SECONDS,
            registry=r,
        )
        self._quota_refused = Counter(
            "loraplex_quota_refused", "Requests that a tenant's limit refused.", ["tenant", "limit"], registry=r
        )
        self._audit_failed = Counter("loraplex_audit_failed", "Lines that the audit log lacks.", registry=r)
        self.generated_tokens = 0
        self.loop_lag = LoopLag(r)
        r.register(OtherMetrics())

    def watch(self, engine: Supervised, admission: Admission, residency: Residency, catalog: Catalog) -> None:
        """Report the live state whenever the metrics are read."""
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "loraplex_engine_ready": ("1 while the engine can generate.", lambda: float(engine.ready)),
            "loraplex_running": ("Requests on the engine.", lambda: admission.running),
            "loraplex_waiting": ("Requests waiting for a place.", lambda: admission.waiting),
            "loraplex_waiting_tokens": ("Tokens that those requests may take.", lambda: admission.waiting_tokens),
            "loraplex_waiting_adapters": (
                "Adapters that requests wait for and none runs on.",
                lambda: admission.waiting_adapters,
            ),
            "loraplex_max_running": ("Places on the engine.", lambda: admission.rules.max_running),
            "loraplex_max_waiting": ("Requests that may wait.", lambda: admission.rules.max_waiting),
            "loraplex_draining": ("1 once no new work is taken.", lambda: float(admission.draining)),
            "loraplex_registry_readable": (
                "1 while the registry could be read, all of it, when it was last looked at.",
                lambda: float(not catalog.last_error),
            ),
            "loraplex_running_adapters": ("Adapters that requests run on.", lambda: admission.running_adapters),
            "loraplex_resident_adapters": ("Adapters in the engine.", lambda: len(residency.residents())),
            "loraplex_pinned_adapters": (
                "Adapters that are pinned.",
                lambda: sum(r.pinned for r in residency.residents()),
            ),
            "loraplex_adapter_slots": ("Adapters that the engine has room for.", lambda: residency.capacity),
            "loraplex_quarantined": ("Versions in quarantine.", lambda: len(residency.quarantined)),
            "loraplex_kv_cache_usage": ("Share of the KV cache in use.", lambda: engine.load_now().kv_cache_usage),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def watch_identity(self, policy_valid: Callable[[], bool], tls: Tls | None) -> None:
        """Report whether the files that decide who may do what are those in force."""
        gauge = Gauge(
            "loraplex_policy_valid",
            "0 while the policy file is broken, and an older one in force.",
            registry=self.registry,
        )
        gauge.set_function(lambda: float(policy_valid()))
        if tls:
            gauge = Gauge(
                "loraplex_tls_valid", "0 while TLS files are broken, and older ones in force.", registry=self.registry
            )
            gauge.set_function(lambda: float(tls.files.valid))
            gauge = Gauge(
                "loraplex_tls_expires", "When our certificate expires, as a Unix time.", registry=self.registry
            )
            gauge.set_function(lambda: tls.ends.timestamp())

    def quota_refused(self, tenant: str, limit: str) -> None:
        """Count a refusal by one of a tenant's limits."""
        self._quota_refused.labels(self._tenants.label(tenant, 1), limit).inc()

    def audit_failed(self) -> None:
        """Count a line that could not be written."""
        self._audit_failed.inc()

    def call(self, method: str, code: str, seconds: float) -> None:
        """Count a finished call."""
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Count an answer, finished or cut short."""
        self.generated_tokens += answer.completion_tokens
        self._generated.inc(answer.completion_tokens)
        self._prompt.inc(answer.prompt_tokens)
        self._cached.inc(answer.cached_tokens)
        tenant = self._tenants.label(answer.tenant, answer.prompt_tokens + answer.completion_tokens)
        self._tenant_tokens.labels(tenant, "prompt").inc(answer.prompt_tokens)
        self._tenant_tokens.labels(tenant, "generated").inc(answer.completion_tokens)
        service = PROMPT_TOKEN_COST * answer.prompt_tokens + ANSWER_TOKEN_COST * answer.completion_tokens
        self._service.labels(tenant).inc(service)
        self._wait.observe(answer.adapter_wait_s)
        if answer.completion_tokens:
            self._ttft.observe(answer.first_token_s)

    def began(self, answer: Answer) -> None:
        """It is counted when it has ended."""

    def ended(self, answer: Answer, ending: Ending) -> None:
        """Count a request by its adapter, and by its side if a canary shared it out."""
        name = answer.manifest.name if answer.manifest else BASE
        self._by_adapter.ended(name, answer, ending)
        tenant = self._tenants.label(answer.tenant, 1)
        self._tenant_requests.labels(tenant, ending.code).inc()
        if answer.first_token_s:
            self._tenant_ttft.labels(tenant).observe(answer.first_token_s)
        if answer.side:
            label = self._canaries.label(name, 1)
            self._split.labels(label, answer.side, ending.code).inc()
            if answer.first_token_s:
                self._split_ttft.labels(label, answer.side).observe(answer.first_token_s)

    def shadow_ended(self, adapter: str, outcome: shadow.Outcome) -> None:
        """Count a copy."""
        self._copies.labels(self._canaries.label(adapter, 1), outcome).inc()

    def in_engine(self, event: InEngine) -> None:
        """Count a load, an eviction or a quarantine by its adapter."""
        self._by_adapter.in_engine(event)

    def waited(self, outcome: Outcome, seconds: float) -> None:
        """Count a wait for a place."""
        self._queue.labels(outcome).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self._refused.labels(reason).inc()

    def adapter_found(self, tier: Tier) -> None:
        """Count where an adapter was when it was needed."""
        self._found.labels(tier).inc()

    def adapter_loaded(self, seconds: float, tier: Tier) -> None:
        """Count a load."""
        self._loads.labels(tier).observe(seconds)

    def adapter_evicted(self, tier: Tier) -> None:
        """Count an eviction."""
        self._evictions.labels(tier).inc()

    def engine_restarted(self, seconds: float) -> None:
        """Count a restart."""
        self._restarts.observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class ByAdapter:
    """What is counted adapter by adapter; the base model is one of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"loraplex_adapter_{name}", text, ["adapter"], buckets=_FEW_SECONDS, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"loraplex_adapter_{name}", text, ["adapter", *labels], registry=registry)

        self._labels = Labels(most=20)
        self._requests = counter("requests", "Requests that have ended, by adapter and status.", "code")
        self._tokens = counter("generated_tokens", "Generated tokens, by adapter.")
        self._queue = histogram("queue_seconds", "Wait of admitted requests for a place, by adapter.")
        self._ttft = histogram("ttft_seconds", "Time to first token, by adapter.")
        self._hits = counter("hits", "Admitted requests whose adapter was in the engine, or not, by adapter.", "hit")
        self._load_wait = histogram("load_wait_seconds", "Wait of requests whose adapter was not in the engine.")
        self._loads = Summary(
            "loraplex_adapter_loaded_seconds", "Loading and probing, by adapter.", ["adapter"], registry=registry
        )
        self._leaving = counter("left", "Versions that left the engine or service, by adapter and why.", "why")

    def ended(self, name: str, answer: Answer, ending: Ending) -> None:
        """Count a request."""
        label = self._labels.label(name, 1)
        self._requests.labels(label, ending.code).inc()
        self._tokens.labels(label).inc(answer.completion_tokens)
        if not answer.admitted:
            return
        self._queue.labels(label).observe(answer.queue_s)
        if answer.manifest:
            self._hits.labels(label, "no" if answer.adapter_wait_s else "yes").inc()
        if answer.adapter_wait_s:
            self._load_wait.labels(label).observe(answer.adapter_wait_s)
        if answer.first_token_s:
            self._ttft.labels(label).observe(answer.first_token_s)

    def in_engine(self, event: InEngine) -> None:
        """Count a load, an eviction or a quarantine."""
        label = self._labels.label(event.manifest.name, 0)
        if event.change == "loaded":
            self._loads.labels(label).observe(event.seconds)
        else:
            self._leaving.labels(label, event.change).inc()


class Labels:
    """Gives a name a label of its own once it has had its part of everything; all other names share the label "other".

    At most `most` names ever get one, so that callers who invent names cannot fill the memory of whoever reads the metrics.
    """

    OTHER = "other"

    def __init__(self, most: int) -> None:
        self._most = most
        self._labels: set[str] = set()
        self._amounts: dict[str, float] = {}  # of names without a label
        self._total = 0.0

    def label(self, name: str, amount: float) -> str:
        """The label to count `amount` of `name` under."""
        self._total += amount
        if name in self._labels:
            return name
        self._amounts[name] = self._amounts.get(name, 0.0) + amount
        if len(self._labels) < self._most and self._amounts[name] * self._most >= self._total:
            self._labels.add(name)
            del self._amounts[name]
            return name
        if len(self._amounts) > 10 * self._most:
            del self._amounts[min(self._amounts, key=lambda other: self._amounts[other])]
        return self.OTHER
