"""`loraplex readapt` and `base check`: what a new base means for the adapters that are there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from engine.commands import output
from engine.commands.params import Json, RegistryUrl, Sign, whoami

if TYPE_CHECKING:
    from engine.commands.fetched import Fetched
    from engine.tuning.rebase import StoredSuite, Verdict
    from engine.tuning.recipe import Recipe

_NewBase = Annotated[Path, typer.Option("--new-base", "--new", metavar="FOLDER", help="The new base model.")]


def check(
    new: _NewBase,
    every: Annotated[bool, typer.Option("--all", help="Every version, not only the current ones.")] = False,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """List which current versions fit another base, which do not, and why.

    Examples:
      loraplex base check --new /models/llama-3.2-1b
      loraplex base check --new /models/llama-3.2-1b --all
      loraplex base check --new ./merged --registry s3://adapters/prod --json

    An adapter fits exactly the weights, tokenizer and precision that it was
    trained on. Others are served without an error by most engines, and answer
    nonsense. Exit code 1 when one does not fit.
    """
    from dataclasses import asdict

    fits = [asdict(fit) for fit in _fits(new, _refs(registry, every=every), registry)]
    output.emit(fits, as_json, lambda: _table(fits))
    if not all(fit["fits"] for fit in fits):
        raise typer.Exit(1)


def _fits(new: Path, refs: list[str], registry: str | None) -> Iterator[Any]:
    from engine.commands.fetched import fetched
    from engine.registry.fingerprint import read_base
    from engine.tuning.rebase import fit_of

    base = read_base(new)
    for ref in refs:
        with fetched([ref], registry) as (version,):
            known = "" if version.assumed else version.fingerprint
            yield fit_of(version.ref, version.folder, known, version.run, base)


def _refs(registry: str | None, *, every: bool) -> list[str]:
    """The adapters that have a current version; or every version there is."""
    from engine.commands.fetched import registry_url
    from engine.registry.registry import Registry
    from engine.registry.store import Store

    async def look() -> list[str]:
        found = Registry(Store.open(registry_url(registry)))
        names = await found.list_names()
        if every:
            return [f"{name}@{version}" for name in names for version in await found.versions(name)]
        return [name for name in names if "current" in await found.aliases(name)]

    return asyncio.run(look())


def _table(fits: list[dict[str, Any]]) -> Iterator[RenderableType]:
    made = output.table("version", "fits", "why")
    for fit in fits:
        made.add_row(fit["ref"], "yes" if fit["fits"] else Text("no", "bold red"), fit["why"])
    yield made


def readapt(
    new_base: _NewBase,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Default: all that do not fit.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Where training data and suites are; may be repeated.")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders are made.")] = Path(".loraplex/runs"),
    held_out_only: Annotated[
        bool, typer.Option("--held-out-only", help="Do without the suites that versions were evaluated on.")
    ] = False,
    sign: Sign = None,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Train current versions again on a new base, and publish those that are at least as good.

    Examples:
      loraplex readapt --new-base /models/llama-3.3-1b --data ./data
      loraplex readapt --new-base ./merged support legal --data ./data

    Recipes come from the versions themselves; their data is found where they
    say, or below --data whatever it is called, by its digest, so a changed file
    is not mistaken for it. Old and new are compared on the held-out rows, and on
    the suites that the old version was evaluated on. What is not as good, or
    cannot be compared as the old one was never right (free text is hardly ever
    exact: evaluate it on a suite first), stays in its run folder, unpublished.
    Recipes, data and suites of all are checked before the first is trained.
    """
    from engine.commands.fetched import fetched
    from engine.registry.names import AdapterRef
    from engine.registry.signatures import check_signing_key

    if sign:
        check_signing_key(sign)
    for name in names or []:
        AdapterRef.parse(name)  # a folder has no name that a new version could go to
    chosen = names or [
        fit.ref.partition("@")[0] for fit in _fits(new_base, _refs(registry, every=False), registry) if fit.can
    ]
    planned: dict[str, _Planned] = {}
    for name in chosen:
        with fetched([name], registry) as (version,):
            if version.ref not in planned:  # it may be named twice, also by name and by version
                planned[version.ref] = _plan(version, new_base, data or [Path()], registry, suites=not held_out_only)
    results: list[dict[str, Any]] = []
    try:
        for one in planned.values():
            _readapt(one, new_base, runs, registry, sign, results)
    finally:
        output.emit(results, as_json, lambda: _outcome(results))


@dataclass(frozen=True)
class _Planned:
    """A version that is to be trained again, with all that this needs."""

    ref: str
    run: dict[str, Any]
    recipe: Recipe
    checkpoint: int  # bytes
    suites: list[StoredSuite]
    left_out: list[str]


def _plan(version: Fetched, new_base: Path, places: list[Path], registry: str | None, *, suites: bool) -> _Planned:
    from engine.tuning import rebase, training

    rebase.check_record(version.run, version.ref)
    records = asyncio.run(_records(version.ref, registry)) if suites else []
    own = rebase.own_data(version.run)
    digests = [version.run["data"].get(side) or "" for side in ("train", "held_out")]
    missing = [digest for digest in digests if digest not in own]
    found = rebase.find_data(places, [*missing, *(record["suite_digest"] for record in records)])
    recipe = rebase.recipe_for(version.run, new_base, {**found, **own}, version.ref)
    checkpoint = training.plan(recipe).estimate.checkpoint
    return _Planned(version.ref, version.run, recipe, checkpoint, *rebase.stored_suites(version.ref, records, found))


def _readapt(
    planned: _Planned,
    new_base: Path,
    runs: Path,
    registry: str | None,
    sign: Path | None,
    results: list[dict[str, Any]],
) -> None:
    """Train, compare and publish one. Its result is in `results` from the start: where the run is, is told after a failure."""
    from engine.commands.signing import signed
    from engine.commands.train_view import progress
    from engine.tuning import rebase, training
    from engine.tuning.run_folder import RunFolder

    runs.mkdir(parents=True, exist_ok=True)
    folder = RunFolder.create(runs, planned.recipe, planned.run["recipe"] | {"base": planned.recipe.base})
    folder.check_space(planned.checkpoint)
    result: dict[str, Any] = {"ref": planned.ref, "published": None, "refused": "it failed", "folder": str(folder.path),
                              "verdicts": [], "left_out": planned.left_out}  # fmt: skip
    results.append(result)
    with progress(f"{planned.ref} on {new_base.name}") as on_event:
        run = training.run(folder, on_event)["run"]
    verdicts = [rebase.on_held_out(planned.run, run)]
    verdicts += rebase.on_suites(new_base, folder.adapter, planned.suites)
    result["verdicts"] = [_told(verdict) for verdict in verdicts]
    refused = rebase.refusal(verdicts)
    if not refused:
        name = planned.ref.partition("@")[0]  # the recipe may be called otherwise
        with signed(folder.adapter, sign) as ready:
            result["published"] = asyncio.run(_publish(ready, name, new_base, registry, planned.ref))
    result["refused"] = refused


def _told(verdict: Verdict) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(verdict) | {"good": verdict.good}


async def _records(ref: str, registry: str | None) -> list[dict[str, Any]]:
    from engine.commands.backends import connect
    from engine.commands.fetched import registry_url

    name, _, version = ref.partition("@")
    async with connect("", registry_url(registry), None) as backend:
        return [*await backend.evaluations(name, version)]


async def _publish(folder: Path, name: str, base: Path, registry: str | None, old: str) -> str:
    from engine.commands import describe
    from engine.commands.backends import Publication, connect
    from engine.commands.fetched import registry_url

    what = Publication(folder=folder, name=name, publisher=whoami(), notes=f"{old} trained again on {base.name}")
    async with connect("", registry_url(registry), base) as backend:
        return describe.ref_of(await backend.publish(what, lambda *_: None))


def _outcome(results: list[dict[str, Any]]) -> Iterator[RenderableType]:
    made = output.table("version", "on", "old", "new", "rows", "outcome")
    for result in results:
        outcome = (
            f"published {result['published']}" if result["published"] else f"{result['refused']}: {result['folder']}"
        )
        rows = [
            (verdict["suite"], f"{verdict['old']:.1%}", f"{verdict['new']:.1%}", str(verdict["rows"]))
            for verdict in result["verdicts"]
        ] or [("", "", "", "")]  # it failed before there was one
        for ref, cells, told in zip_longest([result["ref"]], rows, [outcome], fillvalue=""):
            made.add_row(ref, *cells, told)
    yield made
    for result in results:
        for reason in result["left_out"]:
            yield Text(f"{result['ref']} was not compared on {reason}", "yellow")
    if not all(result["published"] for result in results):
        yield Text(
            "what is not published can be looked at, and published by hand: loraplex adapters publish RUN/adapter NAME",
            "dim",
        )
    yield Text("published versions answer nobody until they are promoted: loraplex adapters promote", "dim")
