"""Logging: structlog, as lines for people on a terminal and as JSON elsewhere. Prompts and answers are never logged."""

from __future__ import annotations

import logging
import sys

import structlog

from engine.config import RouterSettings, Settings
from engine.server.exported_logs import exporter_of


def configure(settings: Settings | RouterSettings) -> None:
    """Set up structlog for the process, and send other libraries' warnings the same way. Raises BadConfiguration."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if exporter := exporter_of(settings):
        shared.append(exporter)
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        # Plain: with rich installed the default shows what every variable held, keys and prompts among them.
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
