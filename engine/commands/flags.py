"""Settings as flags: each has its help, its default and its environment variable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from rich.markup import escape


def add_flags(command: Callable[..., None], settings: type[BaseSettings], panels: Mapping[str, str]) -> None:
    """Give a command --config and a flag for every setting; `panels` names groups by their first setting."""
    signature = inspect.Signature(list(_parameters(settings, panels)), return_annotation=None)
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}


def _parameters(settings: type[BaseSettings], panels: Mapping[str, str]) -> Iterator[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    option = typer.Option("--config", "-c", help="A YAML file with settings.", exists=True, dir_okay=False)
    yield inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, option])
    panel, prefix = "", settings.model_config.get("env_prefix", "")
    for name, field in settings.model_fields.items():
        panel = panels.get(name, panel)
        variable = f"{prefix}{name}".upper()
        yield inspect.Parameter(name, keyword, default=None, annotation=_annotation(name, field, panel, variable))


def _annotation(name: str, field: FieldInfo, panel: str, variable: str) -> Any:
    """The flag of a setting. None means "not given", so that what is below the flags can show through."""
    default = _spelled(field.default)
    facts = " · ".join(filter(None, [default and f"default: {default}", variable]))
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
