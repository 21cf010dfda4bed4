"""Options that several commands have, and what is read from their text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.errors import BadInput

DEFAULT_TARGET = "127.0.0.1:50051"
TARGET_VARIABLE = "LORAPLEX_SERVER"


def scenario_names(incomplete: str) -> list[str]:
    """For the shell's completion: names of scenarios, and .yaml files here."""
    from loadtest.plan.scenario import shipped

    return [name for name in (*shipped(), *map(str, Path().glob("*.yaml"))) if name.startswith(incomplete)]


Names = Annotated[
    list[str],
    typer.Argument(
        metavar="SCENARIO...",
        help="Such as cliff or cliff/a16 (see `scenarios`), or .yaml files.",
        autocompletion=scenario_names,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT[,...]",
        help="Replicas of one server, or the URL of an OpenAI server.",
        envvar=TARGET_VARIABLE,
    ),
]
Serve = Annotated[Path | None, typer.Option(metavar="MODEL", help="Start a server of this model for the run.")]
Adapters = Annotated[list[Path] | None, typer.Option("--adapter", help="With --serve: adapter folders to publish.")]
Engine = Annotated[str, typer.Option(help="With --serve: vllm or fake.")]
OpenAIModel = Annotated[str, typer.Option(help="For an OpenAI server: the base model's name there.")]
Quick = Annotated[bool, typer.Option("--quick", help="The short form, for a machine without a GPU.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the workload, e.g. duration=30s."),
]
Require = Annotated[Path | None, typer.Option("--require", metavar="FILE", help="Requirements, as YAML.")]
Slo = Annotated[str, typer.Option("--slo", help="Requirements in a line: 'ttft.p99<500ms,attainment>=0.95'.")]
Workers = Annotated[int, typer.Option(min=0, help="Client processes; 0 sends from this one.")]
Folder = Annotated[Path | None, typer.Option("--out", help="Where to write; default .loraplex/loadtest/<time>.")]
Json = Annotated[bool, typer.Option("--json", help="Print run.json instead of tables.")]


def default_folder() -> Path:
    """Where a run is written that names no folder."""
    return Path(".loraplex/loadtest") / time.strftime("%Y%m%d-%H%M%S")


def value(read: Callable[[Any], float], flag: str, text: str) -> float:
    """The value of an option that is written as people do (plan/values.py). Raises BadInput, which names the option."""
    try:
        return read(text)
    except ValueError as error:
        raise BadInput(f"{flag}: {error}") from error


def overrides(sets: Sequence[str] | None = None, require: Path | None = None, slo: str = "") -> dict[str, Any]:
    """What --set, --require and --slo change in a workload. Raises BadInput."""
    import yaml

    from loadtest.plan.requirements import from_conditions
    from loadtest.plan.scenario import merged
    from loadtest.plan.strict import read_yaml

    found: dict[str, Any] = {}
    for one in sets or ():
        key, separator, text = one.partition("=")
        if not separator:
            raise BadInput(f"--set {one}: write KEY=VALUE")
        found[key] = yaml.safe_load(text)
    needed = merged(read_yaml(require) if require else {}, from_conditions(slo))
    return found | ({"requirements": needed} if needed else {})
