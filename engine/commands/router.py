"""`loraplex router`: one address for many servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.commands.flags import add_flags
from engine.config import RouterSettings, load

# The first field of each group of settings, in the order of engine/config.py.
_PANELS = {
    "replicas": "Where the replicas are",
    "host": "Where to listen",
    "tls_certificate": "Who may call",
    "max_message_mib": "Bounds",
    "log_format": "Logs and traces",
}


def command(config: Path | None, **flags: Any) -> None:
    """Run a router in front of several servers, until Ctrl-C or SIGTERM.

    Examples:
      loraplex router --replicas 10.0.0.1:50051,10.0.0.2:50051
      loraplex router --fleet fleet.yaml --workers 4
      loraplex generate "hello" --server 127.0.0.1:50050

    It speaks the servers' own protos. A request goes where its adapter is
    warm, and on to another server when that one fails, also in the middle of
    an answer. All servers must share one registry. Ray users want
    `loraplex cluster up`, which starts routers of its own.
    """
    settings = load(RouterSettings, config, **flags)

    from engine.cluster.router import workers
    from engine.server import logs

    logs.configure(settings)
    workers.run(settings)


add_flags(command, RouterSettings, _PANELS)
