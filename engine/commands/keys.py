"""`loraplex keys`: API keys for the policy file."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.text import Text

from engine.commands import output
from engine.commands.params import Json

app = typer.Typer(no_args_is_help=True)


@app.callback()
def keys() -> None:
    """Make API keys for tenants.

    Example:
      loraplex keys create --expires 90 --note "acme's backend"
    """


@app.command()
def create(
    expires: Annotated[float | None, typer.Option(min=0.01, metavar="DAYS", help="Days until it is refused.")] = None,
    note: Annotated[str, typer.Option(help="Who has it, and what for; kept in the policy.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key: print it once, and the lines for the policy file, which hold its digest only.

    Examples:
      loraplex keys create
      loraplex keys create --expires 90 --note "acme's backend"
      loraplex keys create --json | jq -r .key > acme.key

    The key goes to whoever calls (LORAPLEX_API_KEY, or --api-key-file); the
    lines go below `keys:` of a tenant. Nobody can get the key back from them.
    """
    from engine.server.identity.keys import new_key

    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=expires) if expires else None
    key, kept = new_key(until, note)
    data = {"key": key, "policy": kept.model_dump(mode="json", exclude_defaults=True)}
    output.emit(data, as_json, lambda: _render(key, data["policy"]))


def _render(key: str, kept: Any) -> list[Text]:
    import yaml

    lines = yaml.safe_dump([kept], sort_keys=False, width=200).rstrip()
    return [
        Text(key, "bold"),
        Text("It is shown this once. For the policy, below `keys:` of the tenant:", "dim"),
        Text("\n".join(f"      {line}" for line in lines.splitlines())),
    ]
