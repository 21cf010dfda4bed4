"""`loraplex train`: from a recipe to an adapter, or to a published version."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from engine.commands import output
from engine.commands.params import DEFAULT_SERVER, Json, RegistryUrl, Server, Sign
from engine.errors import InvalidRecipe, WrongBase

if TYPE_CHECKING:
    from engine.api.loraplex.v1.engine_pb2 import GetEngineResponse
    from engine.tuning.run_folder import RunFolder

_RUNS = Path(".loraplex/runs")


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file.", dir_okay=False, show_default=False)
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented recipe to RECIPE, and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show samples, train nothing.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Instead of what the recipe says; may be repeated."),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=A,B,...", help="Train once for each value, and compare.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with a run that was stopped or killed.", file_okay=False),
    ] = None,
    publish: Annotated[
        str | None, typer.Option(metavar="NAME", help="Publish the adapter as the next version of NAME.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FOLDER", help="Another base than the recipe's.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also copy the finished adapter there, in the place of an earlier one."),
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders are made.")] = _RUNS,
    sign: Sign = None,
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Train an adapter by a recipe: LoRA, or QLoRA with the base in 4 bits.

    Examples:
      loraplex train support.yaml --init
      loraplex train support.yaml --dry-run
      loraplex train support.yaml --publish support
      loraplex train support.yaml --set rank=8 --set train.steps=50
      loraplex train support.yaml --sweep rank=4,8,16
      loraplex train --resume .loraplex/runs/20261124T101500-support-1a2b3c4d

    The recipe, the base and every row are checked before anything is loaded.
    A run's folder has all that is needed to do it again: recipe, data digests,
    metrics, environment, and adapter/, which `adapters publish` takes.
    """
    if init:
        _init(recipe)
        return
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("name a recipe, or --resume RUN")
    own = "a run goes on by its own recipe"
    _check_beside("--resume", resume, own, {"--dry-run": dry_run, "--set": changes, "--model": model, "--sweep": sweep})
    _check_beside("--sweep", sweep, "a sweep trains once for each value", {"--dry-run": dry_run, "--out": out})
    nothing = "a sweep or a dry run publishes nothing"
    _check_beside("--publish", publish, nothing, {"--sweep": sweep, "--dry-run": dry_run})
    if out is not None:
        _check_out(out)
    given = dict(_assignment(text) for text in changes or [])
    if model is not None:
        given["base"] = str(model.resolve())
    target = _Target(publish, server, registry, sign)
    if publish:
        _check_target(target, recipe, resume, given)
    elif sign:
        raise typer.BadParameter("only what is published is signed: add --publish NAME", param_hint="--sign")
    if recipe and sweep:
        _sweep(recipe, given, sweep, runs, as_json=as_json)
    elif recipe and dry_run:
        _dry_run(recipe, given, as_json=as_json)
    else:
        folder = _resumed(resume) if resume else _begun(recipe, given, runs)  # type: ignore[arg-type]
        result = _run(folder)
        _finish(folder, result, out, target, as_json=as_json)


def _check_beside(flag: str, given: Any, why: str, others: dict[str, Any]) -> None:
    """Raise BadParameter when `flag` is given, and another one that would not be heeded beside it."""
    for other, value in others.items():
        if given and value:
            raise typer.BadParameter(f"{why}: leave out {other}", param_hint=flag)


class _Target:
    """Where to publish, if at all."""

    def __init__(self, name: str | None, server: str, registry: str | None, sign: Path | None) -> None:
        self.name, self.server, self.registry, self.sign = name, server, registry, sign


def _check_target(target: _Target, file: Path | None, resume: Path | None, given: dict[str, Any]) -> None:
    """Raise what publishing would after the training: a bad name or key, no server or registry, another base, a high rank."""
    from engine.commands.adapters.group import run
    from engine.commands.backends import Backend
    from engine.registry.fingerprint import read_base
    from engine.registry.names import check_name
    from engine.registry.signatures import check_signing_key
    from engine.tuning.recipe import load_recipe
    from engine.tuning.run_folder import RunFolder

    check_name(str(target.name))
    if target.sign:
        check_signing_key(target.sign)

    async def look(backend: Backend) -> None:
        await backend.list()

    run(look, target.server, target.registry, create=True)
    if target.registry:
        return
    recipe = load_recipe(file, given) if file else RunFolder.open(resume or Path()).recipe()
    served = asyncio.run(_served(target.server))
    if (base := read_base(Path(recipe.base)).fingerprint) != served.base.fingerprint:
        raise WrongBase(f"an adapter of {recipe.name}", base, served.base.fingerprint)
    if recipe.lora.rank > served.limits.max_rank:
        problem = f"{recipe.lora.rank} is above the {served.limits.max_rank} that {target.server} serves"
        raise InvalidRecipe(
            "lora.rank", problem, fix="Use a smaller rank, or start the server with a higher --max-rank."
        )


async def _served(server: str) -> GetEngineResponse:
    from engine.client import connect

    async with connect(server) as client:
        return await client.engine()


def _init(recipe: Path | None) -> None:
    from engine.tuning.recipe import TEMPLATE

    if recipe is None:
        output.write(TEMPLATE)
        return
    try:
        with recipe.open("x") as file:
            file.write(TEMPLATE)
    except FileExistsError as error:
        raise typer.BadParameter(f"{recipe} exists already; name another file", param_hint="RECIPE") from error
    output.show(Text(f"wrote {recipe}; next: loraplex train {recipe} --dry-run"))


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        return key.strip(), yaml.safe_load(value)
    except Exception as error:  # see engine.config.read_yaml
        raise typer.BadParameter(f"{value!r} is no value", param_hint="--set") from error


def _dry_run(file: Path, given: dict[str, Any], *, as_json: bool) -> None:
    from engine.commands.train_view import plan_data, plan_view
    from engine.tuning.recipe import load_recipe
    from engine.tuning.training import plan, tokenizer_of

    recipe = load_recipe(file, given)
    with output.spinner("checking recipe, base and rows"):
        tokenizer = tokenizer_of(recipe)
        found = plan(recipe, tokenizer)
        data = plan_data(found)
    output.emit(data, as_json, lambda: plan_view(found, tokenizer))


def _begun(file: Path, given: dict[str, Any], runs: Path) -> RunFolder:
    from engine.commands.train_view import needs_line
    from engine.tuning.recipe import load_recipe, written_recipe
    from engine.tuning.run_folder import RunFolder
    from engine.tuning.training import plan

    recipe = load_recipe(file, given)
    with output.spinner("checking recipe, base and rows"):
        found = plan(recipe)
        needs = needs_line(found)
    output.note(needs)
    for line in output.warnings(found.warnings):
        output.err.print(line)
    runs.mkdir(parents=True, exist_ok=True)
    folder = RunFolder.create(runs, recipe, written_recipe(file, given))
    folder.check_space(found.estimate.checkpoint)
    return folder


def _resumed(path: Path) -> RunFolder:
    from engine.tuning.run_folder import RunFolder

    folder = RunFolder.open(path)
    if (folder.adapter / "run.json").is_file():
        raise typer.BadParameter(f"{path} is finished: its adapter is in {folder.adapter}", param_hint="--resume")
    return folder


def _run(folder: RunFolder) -> dict[str, Any]:
    from engine.commands.train_view import progress
    from engine.tuning import training

    try:
        with progress(folder.run_id) as on_event:
            return training.run(folder, on_event)
    except KeyboardInterrupt:
        output.note(f"stopped; go on with: loraplex train --resume {folder.path}")
        raise


def _check_out(out: Path) -> None:
    """Only an adapter's folder is replaced; anything else that is there is left alone."""
    if out.exists() and not (out / "adapter_config.json").is_file():
        raise typer.BadParameter(f"{out} exists, and is no adapter's folder", param_hint="--out")


def _copy(folder: RunFolder, out: Path) -> None:
    _check_out(out)  # again: training takes hours
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder.adapter, out)


def _finish(folder: RunFolder, result: dict[str, Any], out: Path | None, target: _Target, *, as_json: bool) -> None:
    from engine.commands.train_view import result_view

    data = result | {"published": None}
    try:
        if out is not None:
            _copy(folder, out)
        if target.name:
            data["published"] = _publish(folder, target)
    finally:  # what was trained is told, wherever it went
        output.emit(data, as_json, lambda: result_view(folder, data))


def _publish(folder: RunFolder, target: _Target) -> str:
    from engine.commands import describe
    from engine.commands.adapters.group import run
    from engine.commands.backends import Backend, Publication
    from engine.commands.params import whoami
    from engine.commands.signing import signed

    async def work(backend: Backend) -> str:
        with signed(folder.adapter, target.sign) as ready, output.stages(f"publishing {target.name}") as report:
            what = Publication(folder=ready, name=str(target.name), publisher=whoami())
            return describe.ref_of(await backend.publish(what, report))

    return run(work, target.server, target.registry, Path(folder.recipe().base), create=True)


def _sweep(file: Path, given: dict[str, Any], text: str, runs: Path, *, as_json: bool) -> None:
    from engine.commands.train_view import sweep_view
    from engine.tuning.recipe import full_key, load_recipe
    from engine.tuning.training import plan

    key, values = _assignment(text)
    key = full_key(key)
    choices: list[Any] = [_assignment(f"x={value}")[1] for value in str(values).split(",")]
    if len(choices) < 2:
        raise typer.BadParameter("give at least two values: rank=4,8,16", param_hint="--sweep")
    with output.spinner("checking recipe, base and rows for all values"):
        for value in choices:
            plan(load_recipe(file, given | {key: value}))
    results: list[dict[str, Any]] = []
    try:
        for value in choices:
            output.note(f"{key} = {value}")
            folder = _begun(file, given | {key: value}, runs)
            result = _run(folder)
            results.append({"value": value, "folder": str(folder.path), **result["run"], "notes": result["notes"]})
    finally:  # those that were trained are told, also if a later one fails
        if results:
            output.emit({"key": key, "runs": results}, as_json, lambda: sweep_view(key, results))
