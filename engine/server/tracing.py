"""OpenTelemetry traces: a span for each call, and below it one for each part of a request's way.

    loraplex.v1.GenerationService/Generate          from the caller's traceparent, or a trace of its own
    ├─ admission                                    the wait for a place
    ├─ adapter                                      the wait for the adapter
    └─ text_completion support@v2                   on the engine, with the attributes of OpenTelemetry's GenAI conventions
       ├─ prefill                                   until the first token
       └─ decode

Off unless `otlp_endpoint` is set; then nothing of OpenTelemetry is imported, and a call pays for one comparison. Prompts and
answers are in no span.
"""

from __future__ import annotations

import asyncio
import socket
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

from engine.config import RouterSettings, Settings
from engine.errors import BadConfiguration
from engine.runtime.requests import Answer, Ending

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

_FAULTS = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNIMPLEMENTED")
_SECOND = 1_000_000_000


def tracing_of(settings: Settings | RouterSettings, service: str) -> Tracing | None:
    """What the settings ask for. Raises BadConfiguration when OpenTelemetry is not installed."""
    if not settings.otlp_endpoint:
        return None
    try:
        return Tracing(_to_collector(settings.otlp_endpoint), service, settings.trace_share)
    except ModuleNotFoundError as error:
        raise BadConfiguration(f"otlp_endpoint needs {error.name}: pip install 'loraplex[tracing]'") from error


def _to_collector(endpoint: str) -> SpanProcessor:
    """Sends spans in batches, by OTLP over gRPC, with TLS unless the address says http://."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://")))


def resource_of(service: str) -> Resource:
    """Who tells all this, for the collector."""
    from opentelemetry.sdk.resources import Resource

    who = {
        "service.name": service,
        "service.version": metadata.version("loraplex"),
        "service.instance.id": socket.gethostname(),
    }
    return Resource.create(who)


class Tracing:
    """Makes the spans of one process. As the generator's observer it hears of requests when they have ended."""

    def __init__(self, processor: SpanProcessor, service: str, share: float) -> None:
        from opentelemetry import context, trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the process's own provider: vLLM sets that.
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(share)), resource_of(service), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("loraplex")
        self._propagator = TraceContextTextMapPropagator()
        self._trace, self._context = trace, context

    def begin(self, method: str, given: Any) -> Any:
        """The span of a call, which is now the current one; `given` is the call's metadata."""
        carrier = {key: value for key, value in given or () if key in ("traceparent", "tracestate")}
        name = method.strip("/")
        span = self._tracer.start_span(
            name,
            self._propagator.extract(carrier, self._context.Context()),
            self._trace.SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": name},
        )
        self._context.attach(self._trace.set_span_in_context(span))  # a call has a task of its own, which ends with it
        return span

    def end(self, span: Any, code: str, request_id: str) -> None:
        """End a call's span."""
        span.set_attributes({"rpc.response.status_code": code, "loraplex.request_id": request_id})
        self._fail(span, code)
        span.end()

    def began(self, answer: Answer) -> None:
        """Its times are known when it has ended."""

    def ended(self, answer: Answer, ending: Ending) -> None:
        """The spans of a request's way."""
        now = time.time_ns() - int((time.monotonic() - answer.arrived) * _SECOND)

        def at(seconds: float) -> int:
            return now + int(seconds * _SECOND)

        above = self._context.get_current()
        own = None
        if not self._trace.get_current_span(above).get_span_context().is_valid:  # it did not come by gRPC
            own = self._tracer.start_span("generate", start_time=at(0))
            above = self._trace.set_span_in_context(own)
        self._part("admission", at(0), at(answer.queue_s), above)
        if answer.admitted:
            began = answer.queue_s + answer.adapter_wait_s
            if answer.manifest:
                self._part("adapter", at(answer.queue_s), at(began), above, **{"loraplex.adapter": answer.manifest.ref})
            self._on_engine(answer, ending, above, at(began), at(answer.first_token_s), at(max(began, answer.total_s)))
        if own:
            self._fail(own, ending.code)
            own.end()

    def _on_engine(self, answer: Answer, ending: Ending, above: Any, began: int, first: int, end: int) -> None:
        model = answer.manifest.ref if answer.manifest else "base"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "loraplex",
            "gen_ai.request.model": answer.manifest.name if answer.manifest else "base",
            "gen_ai.response.model": model,
            "gen_ai.request.choice.count": answer.answers,
            "gen_ai.usage.input_tokens": answer.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": answer.cached_tokens,
            "gen_ai.usage.output_tokens": answer.completion_tokens,
            "loraplex.tenant": answer.tenant,
        }
        if ending.reason:
            attributes["error.type"] = ending.reason
        span = self._tracer.start_span(f"text_completion {model}", above, attributes=attributes, start_time=began)
        within = self._trace.set_span_in_context(span)
        if answer.first_token_s:
            self._part("prefill", began, first, within)
            self._part("decode", first, end, within)
        self._fail(span, ending.code)
        span.end(end)

    def _part(self, name: str, began: int, end: int, above: Any, **attributes: Any) -> None:
        self._tracer.start_span(name, above, attributes=attributes, start_time=began).end(max(began, end))

    def _fail(self, span: Any, code: str) -> None:
        if code in _FAULTS:
            span.set_status(self._trace.StatusCode.ERROR, code)

    async def close(self) -> None:
        """Send what is left."""
        await asyncio.to_thread(self._provider.shutdown)


def traceparent_of(span: Any) -> str:
    """A span as others are told of it (https://www.w3.org/TR/trace-context)."""
    found = span.get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"
