"""`loraplex serve`: every setting of the server is a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.commands.flags import add_flags
from engine.config import Settings, load_settings

# The first field of each group of settings, in the order of engine/config.py.
_PANELS = {
    "model": "What to serve",
    "host": "Where to listen",
    "policy": "Who may call",
    "dtype": "The engine",
    "max_waiting": "Who goes next",
    "max_message_mib": "Bounds",
    "log_format": "Logs and traces",
}


def command(config: Path | None, **flags: Any) -> None:
    """Run the server until Ctrl-C or SIGTERM, then let the requests in flight finish.

    Examples:
      loraplex serve
      loraplex serve --model /models/llama-8b --registry s3://adapters/prod
      loraplex serve --engine fake --port 0 --http-port 0
      loraplex serve --policy policy.yaml --tls-certificate tls.crt --tls-key tls.key --host 0.0.0.0
      loraplex serve --config loraplex.yaml --log-level debug
      LORAPLEX_PORT=6000 loraplex serve

    A setting is taken from its flag, or else from the environment (LORAPLEX_
    and its name), or else from the --config file (one `name: value` a line),
    or else its default holds.
    """
    import asyncio

    settings = load_settings(config, **flags)

    import uvloop

    from engine.server import app, logs

    logs.configure(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(app.serve(settings))


add_flags(command, Settings, _PANELS)
