"""`loraplex adapters`: publish, promote, roll back, delete. Trying a version out is in trials.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from engine.commands import output
from engine.commands.adapters.group import app, run
from engine.commands.params import (
    DEFAULT_SERVER,
    AliasName,
    Json,
    Model,
    Reason,
    Ref,
    RegistryUrl,
    Server,
    Sign,
    whoami,
)
from engine.registry.names import CURRENT

if TYPE_CHECKING:
    from engine.api.loraplex.v1 import adapters_pb2 as pb
    from engine.commands.backends import Backend, Move, Publication

AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter, such as support.")]


@app.command()
def publish(
    folder: Annotated[
        Path, typer.Argument(help="What PEFT's save_pretrained wrote.", exists=True, file_okay=False, readable=True)
    ],
    name: AdapterName,
    version: Annotated[
        str | None, typer.Option("--version", metavar="vN", help="Which version; default: the next free one.")
    ] = None,
    promote_it: Annotated[bool, typer.Option("--promote", help="Make it the current version at once.")] = False,
    base_fingerprint: Annotated[
        str, typer.Option(metavar="sha256:...", help="The base it was trained on; default: as run.json says.")
    ] = "",
    run_id: Annotated[str, typer.Option(help="The training run that made it; default: as run.json says.")] = "",
    notes: Annotated[str, typer.Option(help="Anything worth knowing.")] = "",
    publisher: Annotated[str | None, typer.Option(help="Who publishes it; default: your user name.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with evaluation results; default: as run.json says.", exists=True, dir_okay=False
        ),
    ] = None,
    sign: Sign = None,
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter's folder as a new version.

    Examples:
      loraplex adapters publish examples/support/v1 support
      loraplex adapters publish ./out support --notes "more refund data" --promote
      loraplex adapters publish ./out support --sign key.pem
      loraplex adapters publish ./out support --registry s3://adapters/prod --model /models/llama

    It is checked first: files, shapes, values, base model. Nothing answers
    differently afterwards, except that the first version of an adapter becomes
    its current one; --promote, or the command promote, switches.
    """
    from engine.commands.backends import Publication
    from engine.commands.signing import signed

    what = Publication(
        folder=folder,
        name=name,
        version=version,
        base_fingerprint=base_fingerprint,
        run_id=run_id,
        publisher=whoami() if publisher is None else publisher,
        notes=notes,
        evaluation=_evaluation(evaluation),
    )
    with signed(folder, sign) as ready:
        what = replace(what, folder=ready)
        data, lines = run(
            lambda backend: _publish(backend, what, promote_it=promote_it), server, registry, model, create=True
        )
    output.emit(data, as_json, lambda: lines)


async def _publish(backend: Backend, what: Publication, *, promote_it: bool) -> tuple[dict[str, Any], list[Text]]:
    from engine.commands import describe
    from engine.commands.backends import Move

    with output.stages(f"publishing {what.name}") as report:
        version = await backend.publish(what, report)
    ref = describe.ref_of(version)
    facts = [output.size(version.size_bytes), f"rank {version.rank}", f"base {version.base_name}"]
    score = describe.score(version)
    lines = [Text(f"published {ref}", "bold").append(f"  {' · '.join(facts)} · score {score}", "not bold")]
    lines += output.warnings(version.warnings)
    data: dict[str, Any] = {"version": describe.version_data(version), "promoted": None}
    if promote_it:
        move = Move(what.name, CURRENT, what.publisher, what.notes)
        change = await _promote(backend, move, version.version, "")
        data["promoted"] = describe.change_data(what.name, change)
        lines.append(describe.change_line(what.name, change))
    else:
        current = (await backend.get(what.name)).adapter.aliases.get(CURRENT)
        own = current == version.version
        hint = f"{what.name} answers with it" if own else f"to switch to it: loraplex adapters promote {ref}"
        lines.append(Text(hint, "dim"))
    return data, lines


def _evaluation(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}", param_hint="--evaluation") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold a JSON object", param_hint="--evaluation")
    return content


@app.command()
def promote(
    ref: Ref,
    alias: AliasName = CURRENT,
    expected: Annotated[
        str, typer.Option(metavar="vN", help="Only if the alias names this version now.", show_default=False)
    ] = "",
    require: Annotated[
        str | None,
        typer.Option(metavar="EXPRESSION", help="Only if its latest evaluation meets this.", show_default=False),
    ] = None,
    reason: Reason = "",
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Let a version answer: load and probe it, then point an alias at it.

    Examples:
      loraplex adapters promote support@v2
      loraplex adapters promote support@v2 --require "accuracy>=0.9 and not worse than current"
      loraplex adapters promote support@v2 --alias canary
      loraplex adapters promote support@canary --reason "canary looks good"
      loraplex adapters promote support@v3 --expected v2

    Requests in flight finish on the version that they started with. `rollback` takes it back.
    --require reads what `loraplex eval` has kept: accuracy, exact, contains,
    regex, json_schema, f1 or loglik, and "not worse than current" (or base).
    """
    from engine.commands.adapters.gate import check_requirement, parsed_requirement
    from engine.commands.backends import Move, find

    conditions = parsed_requirement(require)

    async def work(backend: Backend) -> tuple[str, pb.AliasChange, str]:
        nonlocal expected
        version = await find(backend, ref)
        if conditions:
            current = await check_requirement(backend, version, conditions)
            expected = expected or (current if alias == CURRENT else "")
        move = Move(version.name, alias, whoami(), reason)
        return version.name, await _promote(backend, move, version.version, expected), backend.after_move

    tell_move(*run(work, server, registry), as_json=as_json)


async def _promote(backend: Backend, move: Move, version: str, expected: str) -> pb.AliasChange:
    with output.stages(f"promoting {move.name}@{version}") as report:
        return await backend.promote(move, version, expected, report)


@app.command()
def rollback(
    name: AdapterName,
    alias: AliasName = CURRENT,
    reason: Reason = "",
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Point an alias back at the version that it named before.

    Examples:
      loraplex adapters rollback support
      loraplex adapters rollback support --reason "v2 invents order numbers"
      loraplex adapters rollback support --alias canary
    """
    from engine.commands.backends import Move

    async def work(backend: Backend) -> tuple[str, pb.AliasChange, str]:
        with output.stages(f"rolling back {name}@{alias}") as report:
            change = await backend.rollback(Move(name, alias, whoami(), reason), report)
        return name, change, backend.after_move

    tell_move(*run(work, server, registry), as_json=as_json)


@app.command()
def unalias(
    ref: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="The alias, such as support@canary.")],
    reason: Reason = "",
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Take an alias away; the version that it named stays. "current" cannot be taken away.

    Example:
      loraplex adapters unalias support@canary
    """
    from engine.commands.backends import Move
    from engine.registry.names import AdapterRef

    parsed = AdapterRef.parse(ref)
    if "@" not in ref or parsed.names_version:
        raise typer.BadParameter("name an alias: support@canary", param_hint="NAME@ALIAS")

    async def work(backend: Backend) -> tuple[str, pb.AliasChange, str]:
        move = Move(parsed.name, parsed.selector, whoami(), reason)
        return parsed.name, await backend.remove_alias(move), backend.after_move

    tell_move(*run(work, server, registry), as_json=as_json)


def tell_move(name: str, change: pb.AliasChange, after: str, *, as_json: bool) -> None:
    """Say what an alias names now, and `after` it what is to be known about that."""
    from engine.commands import describe

    output.emit(describe.change_data(name, change), as_json, lambda: [describe.change_line(name, change)])
    if after and not as_json:
        output.note(after)


@app.command()
def delete(
    ref: Annotated[str, typer.Argument(metavar="NAME@vN", help="The version, such as support@v1.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Withdraw a version for good. Its number is never used again; a version that an alias names cannot be deleted.

    Examples:
      loraplex adapters delete support@v1
      loraplex adapters delete support@v1 --yes
    """
    from engine.registry.names import AdapterRef

    parsed = AdapterRef.parse(ref)
    if not parsed.names_version:
        raise typer.BadParameter("name the version: support@v1", param_hint="NAME@vN")
    if not yes:
        typer.confirm(f"Delete {parsed} for good?", abort=True, err=True)

    async def work(backend: Backend) -> str:
        await backend.delete(parsed.name, parsed.selector)
        return backend.after_move

    after = run(work, server, registry)
    output.emit({"deleted": str(parsed)}, as_json, lambda: [Text(f"deleted {parsed}")])
    if after and not as_json:
        output.note("running servers notice within their refresh time (--refresh-s, 2 s by default)")
