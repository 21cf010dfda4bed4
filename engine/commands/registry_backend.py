"""Adapters in a registry, without a server: what a server would do, done here."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.commands.backends import Move, Publication
from engine.commands.output import Report
from engine.config import MEBIBYTE, load_settings
from engine.errors import AliasMoved, BadConfiguration
from engine.registry.aliases import aliases_now
from engine.registry.canary import canary_now
from engine.registry.checks import CheckedAdapter, Limits, check_adapter
from engine.registry.file_checks import CONFIG
from engine.registry.fingerprint import read_base
from engine.registry.manifest import Manifest
from engine.registry.names import CANARY, SHADOW, AdapterRef
from engine.registry.registry import Registry
from engine.server import convert


class RegistryBackend:
    """Reads and writes a registry, as a server would."""

    after_move = "running servers notice within their refresh time (--refresh-s, 2 s by default) and load it when asked"

    def __init__(self, registry: Registry, model: Path | None) -> None:
        self._registry = registry
        self._model = model

    async def list(self) -> list[pb.AdapterSummary]:
        """Read every adapter's aliases."""
        return [await self._summary(name) for name in await self._registry.list_names()]

    async def _summary(self, name: str) -> pb.AdapterSummary:
        history, versions = await asyncio.gather(self._registry.history(name), self._registry.versions(name))
        canary = convert.canary(canary_now(name, history))
        return pb.AdapterSummary(name=name, aliases=aliases_now(history), versions=versions, canary=canary)

    async def get(self, name: str) -> pb.GetAdapterResponse:
        """Read all manifests and the alias log."""
        if not await self._registry.versions(name):
            await self._registry.resolve(AdapterRef(name))  # raises, naming what is alike
        manifests, history = await asyncio.gather(self._registry.manifests(name), self._registry.history(name))
        return pb.GetAdapterResponse(
            adapter=await self._summary(name),
            versions=[convert.version(manifest) for manifest in manifests],
            history=[convert.alias_change(change) for change in history],
        )

    async def publish(self, what: Publication, report: Report) -> pb.AdapterVersion:
        """Check against the local base model, then store."""
        report("checking", "names, shapes, values and base model", 0.1)
        checked = await asyncio.to_thread(check_folder, what.folder, self._model, what.base_fingerprint or None)
        manifest = await self._registry.publish(
            what.folder,
            checked,
            name=what.name,
            version=what.version,
            publisher=what.publisher,
            run_id=what.run_id,
            notes=what.notes,
            evaluation=what.evaluation,
            progress=lambda stage, share: report(stage, "", 0.5 + share / 2),
        )
        return convert.version(manifest)

    async def promote(self, move: Move, version: str, expected: str, report: Report) -> pb.AliasChange:
        """Append to the alias log."""
        report("switching", f"{move.name}@{move.alias} to {version}", 0.5)
        change = await self._registry.set_alias(
            move.name, move.alias, version, actor=move.actor, reason=move.reason, expected=expected or None
        )
        return convert.alias_change(change)

    async def rollback(self, move: Move, report: Report) -> pb.AliasChange:
        """Append to the alias log, unless somebody moves the alias meanwhile."""
        target = await self._registry.rollback_target(move.name, move.alias)
        present = (await self._registry.aliases(move.name)).get(move.alias, "")
        if present == target:
            raise AliasMoved(f"{move.name}@{move.alias}", "the version to roll back from", present)
        reason = move.reason or "rollback"
        return await self.promote(Move(move.name, move.alias, move.actor, reason), target, present, report)

    async def set_canary(
        self, move: Move, version: str, weight: float, trial: pb.CanaryTrial | None, report: Report
    ) -> pb.AliasChange:
        """Append to the alias log."""
        present = version or (await self._registry.resolve(AdapterRef(move.name, CANARY))).version
        report("switching", f"{weight:g} of {move.name} to {present}", 0.5)
        change = await self._registry.set_canary(
            move.name,
            present,
            weight,
            trial=convert.to_trial(trial) if trial else None,
            actor=move.actor,
            reason=move.reason,
            expected=None if version else present,
        )
        return convert.alias_change(change)

    async def end_canary(self, move: Move) -> pb.AliasChange:
        """Append to the alias log."""
        return convert.alias_change(await self._registry.end_canary(move.name, actor=move.actor, reason=move.reason))

    async def canary_report(self, name: str) -> pb.GetCanaryReportResponse:
        """Not known here."""
        raise _ask_a_server(name)

    async def set_shadow(self, move: Move, version: str, sample: float, report: Report) -> pb.AliasChange:
        """Append to the alias log."""
        present = version or (await self._registry.resolve(AdapterRef(move.name, SHADOW))).version
        report("switching", f"copies of {sample:g} of {move.name} to {present}", 0.5)
        change = await self._registry.set_shadow(move.name, present, sample, actor=move.actor, reason=move.reason)
        return convert.alias_change(change)

    async def end_shadow(self, move: Move) -> pb.AliasChange:
        """Append to the alias log."""
        return convert.alias_change(await self._registry.end_shadow(move.name, actor=move.actor, reason=move.reason))

    async def shadow_report(self, name: str) -> pb.GetShadowReportResponse:
        """Not known here."""
        raise _ask_a_server(name)

    async def remove_alias(self, move: Move) -> pb.AliasChange:
        """Append to the alias log."""
        change = await self._registry.remove_alias(move.name, move.alias, actor=move.actor, reason=move.reason)
        return convert.alias_change(change)

    async def delete(self, name: str, version: str) -> None:
        """Withdraw it."""
        await self._registry.delete_version(name, version)

    async def verify(self, version: pb.AdapterVersion, report: Report) -> str:
        """Fetch every byte, compare digests, and check the folder as a publication would."""
        with tempfile.TemporaryDirectory(prefix="loraplex-verify-") as scratch:
            report("fetching", f"{version.size_bytes} bytes", 0.1)
            manifest = await self._fetch(version, Path(scratch))
            report("checking", "names, shapes, values and base model", 0.5)
            await asyncio.to_thread(check_folder, Path(scratch), self._model, manifest.base.fingerprint)
        return "stored bytes match their digests, and every check of a publication passes on this base"

    async def record_evaluation(self, name: str, version: str, record: dict[str, Any]) -> int:
        """Write it."""
        return await self._registry.record_evaluation(name, version, record)

    async def evaluations(self, name: str, version: str) -> Sequence[dict[str, Any]]:
        """Read them."""
        return await self._registry.evaluations(name, version)

    async def config(self, version: pb.AdapterVersion) -> dict[str, Any]:
        """Fetch the version and read its configuration."""
        with tempfile.TemporaryDirectory(prefix="loraplex-diff-") as scratch:
            await self._fetch(version, Path(scratch))
            return dict(json.loads((Path(scratch) / CONFIG).read_bytes()))

    async def compute_dtype(self) -> str:
        """Not known here: servers compute."""
        return ""

    async def _fetch(self, version: pb.AdapterVersion, target: Path) -> Manifest:
        manifest = await self._registry.manifest(version.name, version.version)
        await self._registry.fetch(manifest, target)
        return manifest


def _ask_a_server(name: str) -> BadConfiguration:
    return BadConfiguration(
        f"a registry knows nothing of how {name} is served", fix="Ask a server: --server HOST:PORT."
    )


def check_folder(folder: Path, model: Path | None, fingerprint: str | None = None) -> CheckedAdapter:
    """Check an adapter's folder against a local base model, within the limits that a server here would have."""
    if model is None:
        raise typer.BadParameter("without a server, checks need the base model: --model FOLDER", param_hint="--model")
    settings = load_settings()
    base = read_base(model, settings.cache / "fingerprints")
    limits = Limits(max_rank=settings.max_rank, max_bytes=settings.max_adapter_mib * MEBIBYTE)
    return check_adapter(folder, base, limits, fingerprint)
