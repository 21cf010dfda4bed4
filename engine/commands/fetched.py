"""Versions as folders: out of a registry into a scratch folder, or a folder that the user names."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.commands import output
from engine.commands.backends import check_there
from engine.config import load_settings
from engine.errors import InvalidAdapter, LoraplexError
from engine.registry.checks import FULL, precision_of, read_run
from engine.registry.file_checks import CONFIG, RUN
from engine.registry.names import AdapterRef
from engine.registry.registry import Registry
from engine.registry.store import Store


@dataclass(frozen=True)
class Fetched:
    """A version's files, with what its manifest and its training run say.

    `fingerprint` is that of its base, empty where nothing says it. It is `assumed` where nobody recorded on which base it was
    trained: then it is that of the base beside which it was published.
    """

    ref: str
    folder: Path
    digest: str
    fingerprint: str
    assumed: bool
    run: dict[str, Any]

    @property
    def precision(self) -> str:
        """How its base was held when it was trained: "full" unless its run says otherwise.

        Raises InvalidAdapter if that is nothing known.
        """
        from engine.tuning.recipe import PRECISIONS

        found = precision_of(self.run)
        if found not in PRECISIONS:
            problem = f"{found[:20]!r} is none of {', '.join(PRECISIONS)}"
            fix = f"Say how its base was held: loraplex adapters import FOLDER --out NEW --precision {FULL}."
            raise InvalidAdapter("run record", f"{RUN}: base.precision", problem, fix=fix)
        return found


def registry_url(given: str | None) -> str:
    """The registry to read files from: as given, or that of the settings (servers do not hand files out)."""
    return given or load_settings().registry


@contextmanager
def fetched(refs: Sequence[str], registry: str | None) -> Iterator[list[Fetched]]:
    """Fetch versions and verify every byte; "./folder" is a folder of the user's own."""
    with tempfile.TemporaryDirectory(prefix="loraplex-fetch-") as scratch:
        targets = [Path(scratch) / str(at) for at in range(len(refs))]
        for target in targets:
            target.mkdir()
        with output.spinner("fetching"):
            found = [asyncio.run(_fetch(ref, registry, target)) for ref, target in zip(refs, targets, strict=True)]
        yield found


async def _fetch(ref: str, registry: str | None, target: Path) -> Fetched:
    if "/" in ref:
        run = _run_of(Path(ref))
        fingerprint = run.get("base", {}).get("fingerprint", "")
        return Fetched(ref, Path(ref), "", fingerprint, not fingerprint, run)
    url = registry_url(registry)
    check_there(url, create=False)
    found = Registry(Store.open(url))
    manifest = await found.resolve(AdapterRef.parse(ref))
    await found.fetch(manifest, target)
    base = manifest.base
    return Fetched(manifest.ref, target, manifest.digest, base.fingerprint, base.assumed, _run_of(target))


def _run_of(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise LoraplexError(f"{folder} is no adapter's folder", fix="Name a version (support@v2), or a PEFT folder.")
    return read_run(folder)
