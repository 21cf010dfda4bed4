"""`loraplex adapters`: look at what is published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from engine.commands import output
from engine.commands.adapters.group import app, run
from engine.commands.params import DEFAULT_SERVER, Json, Model, Ref, RegistryUrl, Server

if TYPE_CHECKING:
    from engine.commands.backends import Backend


@app.command("list")
def list_(server: Server = DEFAULT_SERVER, registry: RegistryUrl = None, as_json: Json = False) -> None:
    """List all adapters, with their aliases and versions.

    Examples:
      loraplex adapters list
      loraplex adapters list --registry .loraplex/registry
      loraplex adapters list --json | jq -r '.adapters[].name'
    """
    from engine.commands import describe

    found = run(lambda backend: backend.list(), server, registry)
    data = {"adapters": [describe.summary_data(adapter) for adapter in found]}
    output.emit(data, as_json, lambda: describe.list_view(found))


@app.command()
def show(ref: Ref, server: Server = DEFAULT_SERVER, registry: RegistryUrl = None, as_json: Json = False) -> None:
    """Show an adapter with its versions and history; or one version, if the name says which.

    Examples:
      loraplex adapters show support
      loraplex adapters show support@v2
      loraplex adapters show support@current --json | jq .evaluation
    """
    from engine.commands import describe
    from engine.commands.backends import find

    if "@" in ref:
        version = run(lambda backend: find(backend, ref), server, registry)
        output.emit(describe.version_data(version), as_json, lambda: describe.version_view(version))
        return
    found = run(lambda backend: backend.get(ref), server, registry)
    output.emit(describe.adapter_data(found), as_json, lambda: describe.adapter_view(found))


@app.command()
def verify(
    what: Annotated[str, typer.Argument(metavar="NAME[@REF]|FOLDER", help="A published version, or a folder.")],
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Prove that an adapter can be served, without changing what answers.

    Examples:
      loraplex adapters verify support@v2
      loraplex adapters verify ./my-adapter --model /models/llama-8b
      loraplex adapters verify support --registry .loraplex/registry --model /models/llama-8b

    A version is loaded and probed by the server; with --registry it is
    fetched, its digests are compared, and it is checked here. A folder is
    checked here as a publication would check it: files, shapes, values and
    base model (write ./support if an adapter has the same name).
    """
    data = _verify_folder(Path(what), model) if _is_folder(what) else _verify_version(what, server, registry, model)
    output.emit(
        data, as_json, lambda: [Text(f"ok: {data['ref']}: {data['proven']}"), *output.warnings(data["warnings"])]
    )


def _is_folder(what: str) -> bool:
    return "/" in what or (Path(what) / "adapter_config.json").is_file()


def _verify_folder(folder: Path, model: Path | None) -> dict[str, Any]:
    from engine.commands.registry_backend import check_folder

    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}")
    with output.spinner(f"checking {folder}"):
        checked = check_folder(folder, model)
    proven = (
        f"it may be published: rank {checked.rank}, {len(checked.targets)} kinds of layers, base {checked.base.name}"
    )
    return {"ref": str(folder), "ok": True, "proven": proven, "warnings": list(checked.warnings)}


def _verify_version(ref: str, server: str, registry: str | None, model: Path | None) -> dict[str, Any]:
    from engine.commands import describe
    from engine.commands.backends import find

    async def work(backend: Backend) -> dict[str, Any]:
        version = await find(backend, ref)
        with output.stages(f"verifying {describe.ref_of(version)}") as report:
            proven = await backend.verify(version, report)
        warnings = list(version.warnings)
        return {"ref": describe.ref_of(version), "ok": True, "proven": proven, "warnings": warnings}

    return run(work, server, registry, model)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A version, such as support@v1.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, such as support@v2.")],
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Compare two versions: what they are, how they were trained, how they score.

    Examples:
      loraplex adapters diff support@v1 support@v2
      loraplex adapters diff support@current support@canary --json
      loraplex adapters diff support@v1 legal@v1 --registry .loraplex/registry

    With --registry, the fields of adapter_config.json are compared too, and
    what the two change, layer by layer; servers do not hand files out.
    """
    from engine.commands.comparison import compare, comparison, layer_norms

    async def work(backend: Backend) -> dict[str, Any]:
        return await compare(backend, first, second)

    data = run(work, server, registry)
    if registry is not None and data["different"]:
        from engine.commands.fetched import fetched

        with fetched([first, second], registry) as (a, b):
            if a.fingerprint == b.fingerprint:
                data["layers"] = layer_norms(a.folder, b.folder)
            else:
                data["layers_left_out"] = "they are of different bases, so what they change is not the same weights"
    output.emit(data, as_json, lambda: comparison(data))
