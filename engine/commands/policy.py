"""`loraplex policy`: write a policy file, and check one before a server reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from engine.commands import output
from engine.commands.params import Json

if TYPE_CHECKING:
    from engine.server.identity.policy import Policy, TenantLimits

app = typer.Typer(no_args_is_help=True)


@app.callback()
def policy() -> None:
    """Write and check the file that says who may do what.

    Examples:
      loraplex policy init policy.yaml
      loraplex policy check policy.yaml
      loraplex serve --policy policy.yaml
    """


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; must not be there.")],
) -> None:
    """Write a policy with every key explained: one tenant of each kind, without credentials yet.

    Example:
      loraplex policy init policy.yaml
    """
    from engine.server.identity.example import EXAMPLE

    with file.open("x") as made:
        made.write(EXAMPLE)
    output.out.print(f"wrote {file}: put in keys (loraplex keys create), then loraplex policy check {file}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy.", exists=True, dir_okay=False)],
    as_json: Json = False,
) -> None:
    """Check a policy as a server would, and say who may do what.

    Examples:
      loraplex policy check policy.yaml
      loraplex policy check policy.yaml --json | jq '.tenants[] | select(.roles[] == "admin")'

    A running server reads its policy again when the file changes; one that is
    wrong changes nothing there (loraplex_policy_valid says so).
    """
    from engine.server.identity.policy import read_policy

    found = read_policy(file)
    output.emit(_data(found), as_json, lambda: _render(found))


def _data(found: Policy) -> dict[str, Any]:
    tenants = [
        {
            "name": name,
            "roles": sorted(tenant.roles),
            "adapters": list(tenant.adapters),
            "base": tenant.base,
            "keys": [key.id for key in tenant.keys if not key.revoked],
            "certificates": list(tenant.certificates),
            "limits": tenant.limits.model_dump(exclude_defaults=True),
        }
        for name, tenant in sorted(found.tenants.items())
    ]
    return {"valid": True, "tenants": tenants, "issuers": [issuer.issuer for issuer in found.issuers]}


def _render(found: Policy) -> Iterator[RenderableType]:
    table = Table("tenant", "roles", "adapters", "credentials", "limits", box=None, pad_edge=False)
    for name, tenant in sorted(found.tenants.items()):
        adapters = [*tenant.adapters, *(["the base model"] if tenant.base else [])]
        kinds = [(len(tenant.keys), "key"), (len(tenant.certificates), "certificate")]
        shown = [f"{count} {kind}{'s' * (count > 1)}" for count, kind in kinds if count]
        table.add_row(
            name,
            ", ".join(sorted(tenant.roles)),
            ", ".join(adapters) or "none",
            ", ".join(shown) or ("tokens" if found.issuers else "none"),
            _limits(tenant.limits),
        )
    yield table
    yield f"the policy is valid: {len(found.tenants)} tenants, {len(found.issuers)} issuers of tokens"


def _limits(limits: TenantLimits) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in limits.model_dump(exclude_defaults=True).items()) or "none"
