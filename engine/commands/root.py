"""What all commands share: --version, and how a failure is told."""

from __future__ import annotations

import errno
import re
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from engine.commands.credentials import add_options
from engine.commands.output import err, out, write_json
from engine.commands.params import wants_json
from engine.errors import LoraplexError

_NO_SERVER = "Is a server running there? Start one with `loraplex serve`, or name another with --server."
_ENGINE = "Install the engine: pip install 'loraplex[cpu]', or [gpu] on a machine with an NVIDIA GPU."


class Root(TyperGroup):
    """Turns the errors that a command may raise into a few lines and an exit code; a bug keeps its traceback.

    It also gives every command that calls a server the options that say how.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        add_options(self)

    def invoke(self, ctx: Any) -> Any:
        """Run the command: exit code 1 when it fails, 130 on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            facts = explain(error)
            if facts is None:
                raise
            tell(facts, as_json=wants_json(ctx))
            raise typer.Exit(1) from error


def explain(error: Exception) -> dict[str, Any] | None:
    """What is known about an error of ours; None when it is none."""
    from engine.client.errors import RequestError

    match error:
        case LoraplexError():
            return _facts(error.status, error.reason, error.message, error.fix, getattr(error, "violations", []))
        case RequestError():
            unreachable = error.code.name == "UNAVAILABLE" and not error.fix
            fix = _NO_SERVER if unreachable else error.fix
            return _facts(error.code.name, error.reason, error.message, fix, error.violations)
        case ModuleNotFoundError() if not (error.name or "").startswith("engine"):
            name = error.name or "a module"
            return _facts("FAILED_PRECONDITION", "NOT_INSTALLED", f"{name} is not installed", _install(name), [])
        case OSError() if error.errno != errno.EPIPE:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            return _facts("FAILED_PRECONDITION", "FILE", message, "", [])
    return None


def _install(module: str) -> str:
    """What to install for a module that is missing: the first extra that lists its distribution, or the engine."""
    distribution = module.partition(".")[0].replace("_", "-").lower()
    for requirement in metadata.requires("loraplex") or []:
        listed = re.fullmatch(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if listed and listed[1].lower() == distribution and listed[2] not in ("server", "cpu", "gpu"):
            return f"pip install 'loraplex[{listed[2]}]'"
    return _ENGINE


def _facts(code: str, reason: str, message: str, fix: str, violations: list[tuple[str, str]]) -> dict[str, Any]:
    fields = [{"field": field, "problem": problem} for field, problem in violations]
    return {"code": code, "reason": reason, "message": message, "fix": fix, "violations": fields}


def tell(facts: dict[str, Any], *, as_json: bool) -> None:
    """Say on stderr what went wrong, and what to do about it."""
    if as_json:
        write_json({"error": facts}, console=err)
        return
    err.print(Text("error: ", "bold red").append(facts["message"], "default"), soft_wrap=True)
    if facts["fix"]:
        err.print(Text("fix: ", "bold").append(facts["fix"], "default"), soft_wrap=True)


def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    """Serve many LoRA adapters from one vLLM engine, and manage their versions.

    A first session, one terminal each:

      loraplex doctor
      loraplex serve --model .models/smollm2-135m-instruct
      loraplex adapters publish examples/support/v1 support
      loraplex generate "Where is my parcel?" --adapter support --chat

    An adapter is written support (its current version), support@v2 or
    support@canary. Most commands take --json. Exit codes: 0 it worked, 1 it
    failed, 2 the command line is wrong. Completion: --install-completion
    """


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"loraplex {installed_version()}")
        raise typer.Exit


def installed_version() -> str:
    """The installed version, or that there is none."""
    try:
        return metadata.version("loraplex")
    except metadata.PackageNotFoundError:
        return "(not installed: run from its source folder)"
