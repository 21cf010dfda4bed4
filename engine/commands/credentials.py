"""The options of every command that calls a server: how it knows the server, and how the server knows it.

They are put into the environment for the time of the command, where clients and the load test's processes find them. A key
itself is never an option: every user of a machine can read its command lines.
"""

from __future__ import annotations

import inspect
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

from engine import variables

_PANEL = "Connection"
_OPTIONS = {
    "--tls-ca": (variables.CLIENT_TLS_CA, "FILE|system", "Call by TLS; who signs the server's certificate (PEM)."),
    "--tls-certificate": (variables.CLIENT_TLS_CERTIFICATE, "FILE", "Our certificate, for a server that asks for one."),
    "--tls-key": (variables.CLIENT_TLS_KEY, "FILE", "Its private key."),
    "--api-key-file": (
        variables.API_KEY_FILE,
        "FILE",
        f"File with an API key or token; or put the key itself into {variables.API_KEY}.",
    ),
}


def add_options(group: TyperGroup) -> None:
    """Give the options to every command in the group, and in groups in it, that calls a server."""
    for command in group.commands.values():
        if isinstance(command, TyperGroup):
            add_options(command)
        elif any(getattr(parameter, "envvar", None) == variables.SERVER for parameter in command.params):
            command.params += _options()


def _options() -> list[Any]:
    """The options as click knows them: those of a command that has nothing else."""
    keyword = inspect.Parameter.KEYWORD_ONLY

    def nothing() -> None: ...

    nothing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                flag.strip("-").replace("-", "_"), keyword, default=None, annotation=_annotation(flag, *facts)
            )
            for flag, facts in _OPTIONS.items()
        ]
    )
    app = typer.Typer(add_completion=False)
    app.command()(nothing)
    options = [one for one in typer.main.get_command(app).params if isinstance(one, TyperOption)]
    return [one for one in options if one.opts[0] in _OPTIONS]


def _annotation(flag: str, variable: str, metavar: str, text: str) -> Any:
    def remember(ctx: typer.Context, value: str | None) -> None:
        _set(ctx, variable, value)

    option = typer.Option(
        flag, metavar=metavar, help=text, envvar=variable, show_default=False, expose_value=False, callback=remember,
        rich_help_panel=_PANEL,
    )  # fmt: skip
    return Annotated[str | None, option]


def _set(ctx: Any, variable: str, value: str | None) -> None:
    before = os.environ.get(variable)
    if value is None or value == before:
        return
    os.environ[variable] = value
    ctx.call_on_close(lambda: os.environ.pop(variable) if before is None else os.environ.update({variable: before}))
