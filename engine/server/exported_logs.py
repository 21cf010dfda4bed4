"""The log as OpenTelemetry's records, for a collector (OTLP over gRPC): the same events, beside the lines on standard error.

A record of a traced call names its span. Prompts and answers are in no event, so in no record either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from engine.config import RouterSettings, Settings
from engine.errors import BadConfiguration
from engine.server.tracing import resource_of

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LogRecordProcessor

_PLAIN = (str, bool, int, float)
_NOT_ATTRIBUTES = ("event", "level", "timestamp", "trace_id", "span_id")


def exporter_of(settings: Settings | RouterSettings) -> LogExport | None:
    """What the settings ask for. Raises BadConfiguration when it cannot be done."""
    if not settings.otlp_logs:
        return None
    if not settings.otlp_endpoint:
        raise BadConfiguration(
            "otlp_logs needs otlp_endpoint", fix="Name the collector, such as http://collector:4317."
        )
    try:
        service = "loraplex-router" if isinstance(settings, RouterSettings) else "loraplex"
        return LogExport(_to_collector(settings.otlp_endpoint), service)
    except ModuleNotFoundError as error:
        raise BadConfiguration(f"otlp_logs needs {error.name}: pip install 'loraplex[tracing]'") from error


def _to_collector(endpoint: str) -> LogRecordProcessor:
    """Sends records in batches, with TLS unless the address says http://; what is left goes when the process ends."""
    from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    return BatchLogRecordProcessor(OTLPLogExporter(endpoint=endpoint, insecure=endpoint.startswith("http://")))


class LogExport:
    """A processor of structlog: passes each event on as it is, and tells the collector."""

    def __init__(self, processor: LogRecordProcessor, service: str) -> None:
        from opentelemetry._logs import LogRecord, SeverityNumber
        from opentelemetry.sdk._logs import LoggerProvider

        self._provider = LoggerProvider(resource_of(service))
        self._provider.add_log_record_processor(processor)
        self._logger = self._provider.get_logger("loraplex")
        self._record = LogRecord
        self._severity = {
            "debug": SeverityNumber.DEBUG,
            "info": SeverityNumber.INFO,
            "warning": SeverityNumber.WARN,
            "error": SeverityNumber.ERROR,
            "critical": SeverityNumber.FATAL,
        }

    def __call__(self, logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Tell the collector; the span is the current one."""
        told = dict(structlog.processors.format_exc_info(logger, method, dict(event)))
        level = str(told.get("level", method))
        attributes = {key: _attribute(value) for key, value in told.items() if key not in _NOT_ATTRIBUTES}
        if "exception" in attributes:
            attributes["exception.stacktrace"] = attributes.pop("exception")
        record = self._record(
            body=str(told.get("event", "")),
            severity_text=level,
            severity_number=self._severity.get(level),
            attributes=attributes,
        )
        self._logger.emit(record)
        return event

    def close(self) -> None:
        """Send what is left; the end of the process does the same."""
        self._provider.shutdown()


def _attribute(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else str(value)
