"""Options that several commands have."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_SERVER = "127.0.0.1:50051"
_JSON = "loraplex.json"


def _remember_json(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_JSON] = value
    return value


def wants_json(ctx: Any) -> bool:
    """Whether the command was given --json."""
    return bool(ctx.meta.get(_JSON))


Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, for programs; errors too.", callback=_remember_json, is_eager=True)
]
Server = Annotated[
    str, typer.Option("--server", "-s", metavar="HOST:PORT", envvar="LORAPLEX_SERVER", help="The server to call.")
]
RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL_OR_FOLDER",
        help="Work on this registry itself, without a server.",
        show_default=False,
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        envvar="LORAPLEX_MODEL",
        help="The base model to check against, where no server does.",
        show_default=False,
    ),
]
Sign = Annotated[
    Path | None,
    typer.Option(
        metavar="KEY.pem", help="Sign what is published with this EC private key.", exists=True, dir_okay=False
    ),
]
Ref = Annotated[str, typer.Argument(metavar="NAME[@REF]", help="support, support@v2 or support@canary.")]
AliasName = Annotated[str, typer.Option("--alias", help="The alias to move.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the alias's history.", show_default=False)]


def whoami() -> str:
    """The user's name, for the registry's records; empty if the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
