"""Where adapters are managed: through a running server, or on a registry itself. The commands do not see which."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine import client as clients
from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.client import AsyncClient
from engine.client.adapters import OnProgress
from engine.commands.output import Report
from engine.errors import BadConfiguration
from engine.registry.aliases import select_version
from engine.registry.names import AdapterRef


@dataclass(frozen=True)
class Publication:
    """What is to be published."""

    folder: Path
    name: str
    version: str | None = None
    base_fingerprint: str = ""
    run_id: str = ""
    publisher: str = ""
    notes: str = ""
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Move:
    """Which alias to move, and what to write into its history."""

    name: str
    alias: str
    actor: str = ""
    reason: str = ""


class Backend(Protocol):
    """The operations of the `adapters` commands. `after_move` is what to tell the user after an alias has moved."""

    after_move: str

    async def list(self) -> list[pb.AdapterSummary]:
        """All adapters, by name."""
        ...

    async def get(self, name: str) -> pb.GetAdapterResponse:
        """One adapter: versions, aliases, history."""
        ...

    async def publish(self, what: Publication, report: Report) -> pb.AdapterVersion:
        """Check a folder and publish it."""
        ...

    async def promote(self, move: Move, version: str, expected: str, report: Report) -> pb.AliasChange:
        """Point the alias at a version; AliasMoved or Aborted when it does not name `expected` ("": any) now."""
        ...

    async def rollback(self, move: Move, report: Report) -> pb.AliasChange:
        """Point the alias at the version that it named before."""
        ...

    async def set_canary(
        self, move: Move, version: str, weight: float, trial: pb.CanaryTrial | None, report: Report
    ) -> pb.AliasChange:
        """Give a version ("": the one that the alias names) a share of the bare name's requests."""
        ...

    async def end_canary(self, move: Move) -> pb.AliasChange:
        """Let the current version answer alone."""
        ...

    async def canary_report(self, name: str) -> pb.GetCanaryReportResponse:
        """How the canary fares; only servers know."""
        ...

    async def set_shadow(self, move: Move, version: str, sample: float, report: Report) -> pb.AliasChange:
        """Have a version ("": the one that the alias names) asked copies of a share of the bare name's requests."""
        ...

    async def end_shadow(self, move: Move) -> pb.AliasChange:
        """Copy no more requests."""
        ...

    async def shadow_report(self, name: str) -> pb.GetShadowReportResponse:
        """How the shadow answers; only servers know."""
        ...

    async def remove_alias(self, move: Move) -> pb.AliasChange:
        """Take the alias away."""
        ...

    async def delete(self, name: str, version: str) -> None:
        """Withdraw a version."""
        ...

    async def verify(self, version: pb.AdapterVersion, report: Report) -> str:
        """Prove that a version can be served; says in a sentence what was proven."""
        ...

    async def record_evaluation(self, name: str, version: str, record: dict[str, Any]) -> int:
        """Keep an evaluation beside its version."""
        ...

    async def evaluations(self, name: str, version: str) -> Sequence[dict[str, Any]]:
        """A version's evaluations, oldest first."""
        ...

    async def config(self, version: pb.AdapterVersion) -> dict[str, Any] | None:
        """The version's adapter_config.json; None where it cannot be had."""
        ...

    async def compute_dtype(self) -> str:
        """The precision that answers are computed in; empty where that is not known."""
        ...


async def find(backend: Backend, text: str) -> pb.AdapterVersion:
    """The version that a reference names."""
    ref = AdapterRef.parse(text)
    found = await backend.get(ref.name)
    versions = {version.version: version for version in found.versions}
    return versions[select_version(ref, versions, dict(found.adapter.aliases))]


@asynccontextmanager
async def connect(
    server: str, registry: str | None, model: Path | None, *, create: bool = False
) -> AsyncIterator[Backend]:
    """The registry if one is given (a folder is made if `create`), else the server."""
    if registry is not None:
        check_there(registry, create=create)
        from engine.commands.registry_backend import RegistryBackend
        from engine.registry.registry import Registry
        from engine.registry.store import Store

        yield RegistryBackend(Registry(Store.open(registry)), model)
        return
    async with clients.connect(server) as client:
        yield ServerBackend(client)


class ServerBackend:
    """Asks a server."""

    after_move = ""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._adapters = client.adapters

    async def list(self) -> list[pb.AdapterSummary]:
        """Ask."""
        return [*await self._adapters.list()]

    async def get(self, name: str) -> pb.GetAdapterResponse:
        """Ask."""
        return await self._adapters.get(name)

    async def publish(self, what: Publication, report: Report) -> pb.AdapterVersion:
        """Upload the folder; the server checks it."""
        return await self._adapters.publish(
            what.folder,
            what.name,
            what.version,
            what.base_fingerprint,
            what.run_id,
            what.publisher,
            what.notes,
            what.evaluation,
            _forward(report),
        )

    async def promote(self, move: Move, version: str, expected: str, report: Report) -> pb.AliasChange:
        """The server loads and probes the version first."""
        return await self._adapters.promote(
            move.name, version, move.alias, expected, move.actor, move.reason, _forward(report)
        )

    async def rollback(self, move: Move, report: Report) -> pb.AliasChange:
        """The server loads the version first, if it has gone meanwhile."""
        return await self._adapters.rollback(move.name, move.alias, move.actor, move.reason, _forward(report))

    async def set_canary(
        self, move: Move, version: str, weight: float, trial: pb.CanaryTrial | None, report: Report
    ) -> pb.AliasChange:
        """The server loads and probes the version first."""
        return await self._adapters.set_canary(
            move.name, weight, version, move.actor, move.reason, _forward(report), trial=trial
        )

    async def end_canary(self, move: Move) -> pb.AliasChange:
        """Ask."""
        return await self._adapters.end_canary(move.name, move.actor, move.reason)

    async def canary_report(self, name: str) -> pb.GetCanaryReportResponse:
        """Ask."""
        return await self._adapters.canary_report(name)

    async def set_shadow(self, move: Move, version: str, sample: float, report: Report) -> pb.AliasChange:
        """The server loads and probes the version first."""
        return await self._adapters.set_shadow(move.name, sample, version, move.actor, move.reason, _forward(report))

    async def end_shadow(self, move: Move) -> pb.AliasChange:
        """Ask."""
        return await self._adapters.end_shadow(move.name, move.actor, move.reason)

    async def shadow_report(self, name: str) -> pb.GetShadowReportResponse:
        """Ask."""
        return await self._adapters.shadow_report(name)

    async def remove_alias(self, move: Move) -> pb.AliasChange:
        """Ask."""
        return await self._adapters.remove_alias(move.name, move.alias, move.actor, move.reason)

    async def delete(self, name: str, version: str) -> None:
        """Ask."""
        await self._adapters.delete_version(name, version)

    async def verify(self, version: pb.AdapterVersion, report: Report) -> str:
        """Let the engine load the version and probe it."""
        await self._adapters.preload(f"{version.name}@{version.version}", _forward(report))
        return (
            "the server has it in its engine: stored bytes match their digests, and its answers differ from the base's"
        )

    async def record_evaluation(self, name: str, version: str, record: dict[str, Any]) -> int:
        """Ask."""
        return await self._adapters.record_evaluation(name, version, record)

    async def evaluations(self, name: str, version: str) -> Sequence[dict[str, Any]]:
        """Ask."""
        return await self._adapters.evaluations(name, version)

    async def config(self, version: pb.AdapterVersion) -> None:
        """Servers do not hand files out."""

    async def compute_dtype(self) -> str:
        """Ask."""
        return (await self._client.engine()).compute_dtype


def _forward(report: Report) -> OnProgress:
    return lambda step: report(step.stage, step.detail, step.fraction)


def check_there(registry: str, *, create: bool) -> None:
    """Raise BadConfiguration when there is no registry, unless it would be made."""
    if "://" not in registry and not create and not Path(registry).is_dir():
        fix = "Name the folder or URL that the server was started with."
        raise BadConfiguration(f"there is no registry in {registry}", fix=fix)
