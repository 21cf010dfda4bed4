"""`loraplex adapters import` and `export`: adapters from elsewhere, and to elsewhere."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from engine.commands import output
from engine.commands.adapters.group import app
from engine.commands.params import Json, Model, Ref, RegistryUrl
from engine.errors import InvalidAdapter, LoraplexError, NotAllowedNow

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB = "hf://"
_ADAPTERS = ("*.json", "*.safetensors")  # what belongs to one version; a model card belongs to the repository
_WANTED = (*_ADAPTERS, "*.md", "*.txt")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A folder, hf://OWNER/NAME[@REVISION], or s3://, gs://, az:// URL.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the plain LoRA.")],
    initial: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The adapter as it began (PiSSA, OLoRA).", file_okay=False)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="full|nf4-double|...", help="How its base was held in training (QLoRA).", show_default=False
        ),
    ] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Turn an adapter trained elsewhere into a folder that can be published.

    Examples:
      loraplex adapters import ./axolotl-out --out ready --model /models/llama
      loraplex adapters import hf://me/my-adapter --out ready
      loraplex adapters import ./pissa-out --initial ./pissa-out/pissa_init --out ready
      loraplex adapters import ./unsloth-qlora --precision nf4-double --out ready

    PEFT, axolotl, LLaMA-Factory and Unsloth all write such folders; what else
    is in them is left out. PiSSA becomes plain LoRA of twice the rank, DoRA
    where it amounts to plain LoRA; what cannot be converted exactly is refused
    by name. With --model it is also checked against the base. An adapter that
    was trained on a base in 4 bits does not say so itself: --precision nf4,
    fp4, and with quantised scales ("double") nf4-double, fp4-double. `merge`
    then compares what it can be merged onto.
    """
    from engine.commands.registry_backend import check_folder
    from engine.tuning.conversion import import_adapter
    from engine.tuning.recipe import PRECISIONS

    if precision not in (None, *PRECISIONS):
        raise typer.BadParameter(f"{precision!r} is none of {', '.join(PRECISIONS)}", param_hint="--precision")
    if out.exists():
        raise typer.BadParameter(f"{out} exists already", param_hint="--out")
    with output.spinner(f"importing {source}"), _local(source) as folder:
        try:
            found = import_adapter(folder, out, model, initial, precision)
            warnings = list(check_folder(out, model).warnings) if model else []
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
    data = {"folder": str(out), "converted": list(found.done), "left_out": list(found.left_out), "warnings": warnings}
    output.emit(data, as_json, lambda: _render(data))


def _render(data: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text(f"imported into {data['folder']}", "bold")
    for what in data["converted"]:
        yield Text(f"  converted: {what}")
    if data["left_out"]:
        yield Text(f"  left out: {', '.join(data['left_out'])}", "dim")
    yield from output.warnings(data["warnings"])
    yield Text(f"to publish it: loraplex adapters publish {data['folder']} NAME", "dim")


@app.command()
def export(
    ref: Ref,
    target: Annotated[str, typer.Argument(help="A new folder, hf://OWNER/NAME, or s3://, gs://, az:// URL.")],
    private: Annotated[bool, typer.Option(help="On the Hub: a private repository.")] = True,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Copy a version's files out of the registry, as PEFT wrote them.

    Examples:
      loraplex adapters export support@v2 ./support-v2
      loraplex adapters export support@v2 hf://me/support --private
      loraplex adapters export support@v2 s3://bucket/adapters/support-v2

    `PeftModel.from_pretrained` loads what comes out. Every byte is checked
    against the version's digest first. Nothing that exists is overwritten in a
    folder or bucket; on the Hub it is a new commit without other adapter files,
    tagged with the version. A public repository, or a tag of other files, is
    refused.
    """
    from engine.commands.fetched import fetched

    with fetched([ref], registry) as (version,):
        _send(version.folder, target, version.ref, private=private)
    data = {"ref": version.ref, "digest": version.digest, "target": target}
    output.emit(data, as_json, lambda: [Text(f"exported {version.ref} to {target}")])


def _send(folder: Path, target: str, ref: str, *, private: bool) -> None:
    if target.startswith(_HUB):
        _to_hub(folder, target, ref, private=private)
    elif "://" in target:
        asyncio.run(_upload(folder, target))
    else:
        if Path(target).exists():
            raise typer.BadParameter(f"{target} exists already", param_hint="TARGET")
        shutil.copytree(folder, target)


def _to_hub(folder: Path, target: str, ref: str, *, private: bool) -> None:
    from huggingface_hub import HfApi

    hub, name, tag = HfApi(), target.removeprefix(_HUB), ref.partition("@")[2]
    fix = "Name OWNER/NAME that you may write to, and log in: hf auth login."
    with _translated(lambda why: NotAllowedNow(f"the Hub does not take {target}: {why}", fix=fix)):
        hub.create_repo(name, private=private, exist_ok=True)  # one that exists stays as visible as it is
        if private and not hub.repo_info(name).private:
            fix = "Name another repository, make this one private, or let everybody see it: --no-private."
            raise NotAllowedNow(f"{target} is public", fix=fix)
        tags = {found.name for found in hub.list_repo_refs(name).tags}
        if tag in tags and not _holds(hub, name, tag, folder):
            fix = f"Name another repository, or delete the tag {tag} there."
            raise NotAllowedNow(f"{target} has a tag {tag}, and its files are others", fix=fix)
        hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message=f"loraplex: {ref}", delete_patterns=list(_ADAPTERS)
        )
        hub.create_tag(name, tag=tag, exist_ok=True)


def _holds(hub: HfApi, name: str, tag: str, folder: Path) -> bool:
    """Whether a tag's adapter files are these. The Hub knows large ones by their SHA-256, others by git's own digest."""
    from huggingface_hub.hf_api import RepoFile

    there = {
        file.path: file.lfs.sha256 if file.lfs else file.blob_id
        for file in hub.list_repo_tree(name, revision=tag, recursive=True)
        if isinstance(file, RepoFile)
    }
    here = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = [path for path in there.keys() - here.keys() if any(Path(path).match(pattern) for pattern in _ADAPTERS)]
    return not other and all(there.get(path) in _digests(data) for path, data in here.items())


def _digests(data: bytes) -> tuple[str, str]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return hashlib.sha256(data).hexdigest(), git.hexdigest()


async def _upload(folder: Path, target: str) -> None:
    from engine.registry.store import AlreadyThere, Store

    store = Store.open(target)
    for path in sorted(await asyncio.to_thread(lambda: [*folder.iterdir()])):
        try:
            await store.create(path.name, await asyncio.to_thread(path.read_bytes))
        except AlreadyThere as error:
            raise NotAllowedNow(f"{target} already holds {path.name}", fix="Name another place.") from error


@contextmanager
def _local(source: str) -> Iterator[Path]:
    """The source as a folder here."""
    from engine.tuning.conversion import check_names

    if "://" not in source:
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="loraplex-import-") as scratch:
        if source.startswith(_HUB):
            from huggingface_hub import HfApi, snapshot_download

            name, _, revision = source.removeprefix(_HUB).partition("@")
            fix = "Name OWNER/NAME[@REVISION] that you may read; for private ones log in: hf auth login."
            with _translated(lambda why: InvalidAdapter("files", source, f"it cannot be fetched: {why}", fix=fix)):
                check_names(HfApi().list_repo_files(name, revision=revision or None))
                snapshot_download(name, revision=revision or None, local_dir=scratch, allow_patterns=list(_WANTED))
        else:
            asyncio.run(_download(source, Path(scratch)))
        yield Path(scratch)


@contextmanager
def _translated(refused: Callable[[str], LoraplexError]) -> Iterator[None]:
    """Raise what the Hub's client raises as an error of ours."""
    try:
        yield
    except LoraplexError:
        raise
    except Exception as error:  # its own errors, and those of whatever HTTP library it uses
        raise refused(" ".join(str(error).split())[:300] or type(error).__name__) from error


async def _download(source: str, target: Path) -> None:
    from engine.registry.store import Store
    from engine.tuning.conversion import check_names

    store = Store.open(source)
    paths = await store.list("")
    check_names(paths)
    for path in paths:
        if "/" not in path and any(Path(path).match(pattern) for pattern in _WANTED):
            data = await store.get(path)
            await asyncio.to_thread((target / path).write_bytes, data)
