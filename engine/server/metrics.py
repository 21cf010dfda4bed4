"""Prometheus metrics. Labels are methods and status codes only, so their number is bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.runtime.admission import Admission
from engine.runtime.engine import Engine
from engine.runtime.generator import Answer
from engine.runtime.residency import Residency

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Everything that this server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._calls = Counter("loraplex_calls", "gRPC calls, by method and status.", ["method", "code"], registry=r)
        self._seconds = Histogram("loraplex_call_seconds", "Length of calls.", ["method"], buckets=_SECONDS, registry=r)
        self._ttft = Histogram("loraplex_ttft_seconds", "Time to first token.", buckets=_SECONDS, registry=r)
        self._queue = Histogram("loraplex_queue_seconds", "Wait for a place.", buckets=_SECONDS, registry=r)
        self._wait = Histogram("loraplex_adapter_wait_seconds", "Wait for the adapter.", buckets=_SECONDS, registry=r)
        self._prompt = Counter("loraplex_prompt_tokens", "Prompt tokens.", registry=r)
        self._generated = Counter("loraplex_generated_tokens", "Generated tokens.", registry=r)
        self._loads = Histogram("loraplex_adapter_load_seconds", "Loading and probing.", buckets=_SECONDS, registry=r)
        self._evictions = Counter("loraplex_adapter_evictions", "Adapters taken out of the engine.", registry=r)
        self.generated_tokens = 0

    def watch(self, engine: Engine, admission: Admission, residency: Residency) -> None:
        """Report the live state whenever the metrics are read."""
        gauges = {
            "loraplex_running": ("Requests on the engine.", lambda: admission.running),
            "loraplex_waiting": ("Requests waiting for a place.", lambda: admission.waiting),
            "loraplex_resident_adapters": ("Adapters in the engine.", lambda: len(residency.residents())),
            "loraplex_kv_cache_usage": ("Share of the KV cache in use.", lambda: engine.load_now().kv_cache_usage),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def call(self, method: str, code: str, seconds: float) -> None:
        """Count a finished call."""
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Count an answer, finished or cut short."""
        self.generated_tokens += answer.completion_tokens
        self._generated.inc(answer.completion_tokens)
        self._prompt.inc(answer.prompt_tokens)
        self._queue.observe(answer.queue_s)
        self._wait.observe(answer.adapter_wait_s)
        if answer.completion_tokens:
            self._ttft.observe(answer.first_token_s)

    def adapter_loaded(self, seconds: float) -> None:
        """Count a load."""
        self._loads.observe(seconds)

    def adapter_evicted(self) -> None:
        """Count an eviction."""
        self._evictions.inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
