"""`loraplex serve`: every setting of the server is a flag."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from engine.config import Settings, load_settings

# The first field of each group of settings, in the order of engine/config.py.
_PANELS = {
    "model": "What to serve",
    "host": "Where to listen",
    "dtype": "The engine",
    "max_waiting": "Who goes next",
    "max_message_mib": "Bounds",
    "log_format": "Logs",
}


def command(config: Path | None, **flags: Any) -> None:
    """Run the server until Ctrl-C or SIGTERM, then let the requests in flight finish.

    Examples:
      loraplex serve
      loraplex serve --model /models/llama-8b --registry s3://adapters/prod
      loraplex serve --engine fake --port 0 --http-port 0
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


def _parameters() -> Iterator[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    option = typer.Option("--config", "-c", help="A YAML file with settings.", exists=True, dir_okay=False)
    yield inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, option])
    panel = ""
    for name, field in Settings.model_fields.items():
        panel = _PANELS.get(name, panel)
        yield inspect.Parameter(name, keyword, default=None, annotation=_annotation(name, field, panel))


def _annotation(name: str, field: FieldInfo, panel: str) -> Any:
    """The flag of a setting. None means "not given", so that what is below the flags can show through."""
    default = _spelled(field.default)
    facts = " · ".join(filter(None, [default and f"default: {default}", f"LORAPLEX_{name.upper()}"]))
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    text = f"{escape(field.description or '')} [dim]{escape(facts)}[/dim]"
    option = typer.Option(flag, help=text, show_default=False, rich_help_panel=panel)
    return Annotated[field.annotation | None, option]  # type: ignore[operator]


def _spelled(default: Any) -> str:
    if default is None:
        return ""
    return ("yes" if default else "no") if isinstance(default, bool) else str(default)


_SIGNATURE = inspect.Signature(list(_parameters()), return_annotation=None)
command.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
command.__annotations__ = {name: parameter.annotation for name, parameter in _SIGNATURE.parameters.items()}
