"""AdapterService: publish, look, promote, roll back, load, delete, watch. Trying a version out is in trial_methods.py."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import adapters_pb2_grpc
from engine.errors import AdapterNotFound, AliasMoved, InvalidRequest, Overloaded, QuotaExceeded
from engine.registry.aliases import version_before
from engine.registry.catalog import AdapterView, AliasChanged, Catalog, Deleted, Event, InEngine, Published
from engine.registry.checks import Limits, check_adapter
from engine.registry.fingerprint import Base
from engine.registry.manifest import Manifest
from engine.registry.names import CURRENT, AdapterRef
from engine.registry.registry import Registry
from engine.runtime.residency import OnStage, Residency
from engine.runtime.shadow import Shadows
from engine.server import convert
from engine.server.call import Context
from engine.server.identity import principal
from engine.server.moves import Moves
from engine.server.progress import progress, reported
from engine.server.trial_methods import TrialMethods
from engine.server.trials import Trials
from engine.server.uploads import Upload, private_folder

_UPLOAD_S = 5.0  # when to try again: nobody knows when one ends


class AdapterService(TrialMethods, adapters_pb2_grpc.AdapterServiceServicer):
    """Everything about adapters but answering with them."""

    def __init__(
        self,
        registry: Registry,
        catalog: Catalog,
        residency: Residency,
        moves: Moves,
        trials: Trials,
        shadows: Shadows,
        base: Base,
        limits: Limits,
        max_publishing: int,
    ) -> None:
        super().__init__(registry, catalog, moves, trials, shadows)
        self._residency = residency
        self._base = base
        self._limits = limits
        self._max_publishing = max_publishing
        self._publishing: Counter[str] = Counter()  # by tenant

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """All adapters that the caller may know of, as the store has them now."""
        await self._catalog.refresh()
        views, sees = sorted(self._catalog.adapters.items()), principal().sees
        return pb.ListAdaptersResponse(adapters=[_summary(view) for name, view in views if sees(name)])

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """One adapter with its versions and its history."""
        await self._catalog.refresh()
        view = self._catalog.adapter(request.name)
        return pb.GetAdapterResponse(
            adapter=_summary(view),
            versions=[self._version(manifest) for manifest in view.manifests.values()],
            history=[convert.alias_change(change) for change in view.history],
        )

    async def PublishAdapter(
        self,
        requests: AsyncIterator[pb.PublishAdapterRequest],
        context: Context,
    ) -> AsyncIterator[pb.PublishAdapterResponse]:
        """Receive into a private folder, check there, then store; until then nothing of it is visible to anyone."""
        tenant = principal()
        if (under_way := self._publishing.total()) >= self._max_publishing:
            raise Overloaded(under_way, "uploads are under way")
        # One place is left for the others.
        if not tenant.trusted and self._publishing[tenant.tenant] >= max(1, self._max_publishing - 1):
            raise QuotaExceeded(tenant.tenant, f"has {self._publishing[tenant.tenant]} uploads under way", _UPLOAD_S)
        self._publishing[tenant.tenant] += 1
        try:
            header = await _header(requests)
            evaluation = _evaluation(header.evaluation_json)
            with private_folder() as scratch:
                upload = Upload(scratch, self._limits.max_bytes)
                async with aclosing(upload.receive(requests)) as received:
                    async for total in received:
                        detail = f"{total} bytes"
                        yield pb.PublishAdapterResponse(progress=progress("receiving", detail))
                publishing = partial(self._publish, header, evaluation, scratch)
                async with aclosing(reported(publishing, pb.PublishAdapterResponse)) as responses:
                    async for response in responses:
                        yield response
        finally:
            self._publishing[tenant.tenant] -= 1
            self._publishing += Counter()  # forget who has none

    async def _publish(
        self, header: pb.PublishHeader, evaluation: dict[str, Any] | None, folder: Path, report: OnStage
    ) -> pb.PublishAdapterResponse:
        report("checking", "names, shapes, values and base model")
        checked = await asyncio.to_thread(
            check_adapter, folder, self._base, self._limits, header.base_fingerprint or None
        )
        report("storing", f"{len(checked.files)} files")
        manifest = await self._registry.publish(
            folder,
            checked,
            name=header.name,
            version=header.version or None,
            publisher=header.publisher,
            run_id=header.run_id,
            notes=header.notes,
            evaluation=evaluation,
        )
        await self._catalog.refresh()
        return pb.PublishAdapterResponse(version=convert.version(manifest))

    def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> AsyncGenerator[pb.SetAliasResponse, None]:
        """Warm the version, then move the alias."""

        async def move(report: OnStage) -> pb.SetAliasResponse:
            await self._catalog.refresh()
            switch = partial(
                self._registry.set_alias, request.name, request.alias, request.version,
                actor=request.actor, reason=request.reason, expected=request.expected_version or None,
            )  # fmt: skip
            change = await self._moves.move(request.name, request.alias, request.version, switch, report)
            return pb.SetAliasResponse(change=convert.alias_change(change))

        return reported(move, pb.SetAliasResponse)

    def RollbackAlias(
        self, request: pb.RollbackAliasRequest, context: Context
    ) -> AsyncGenerator[pb.RollbackAliasResponse, None]:
        """Warm the version that the alias named before (as a rule it still is), then move the alias back."""
        alias = request.alias or CURRENT

        async def move(report: OnStage) -> pb.RollbackAliasResponse:
            await self._catalog.refresh()
            view = self._catalog.adapter(request.name)
            present = self._catalog.resolve(AdapterRef(request.name, alias)).version
            if request.expected_version and request.expected_version != present:
                raise AliasMoved(f"{request.name}@{alias}", request.expected_version, present)
            target = version_before(request.name, alias, view.history, view.manifests)
            reason = request.reason or "rollback"
            switch = partial(
                self._registry.set_alias, request.name, alias, target,
                actor=request.actor, reason=reason, expected=present,
            )  # fmt: skip
            change = await self._moves.move(request.name, alias, target, switch, report)
            return pb.RollbackAliasResponse(change=convert.alias_change(change))

        return reported(move, pb.RollbackAliasResponse)

    async def RemoveAlias(self, request: pb.RemoveAliasRequest, context: Context) -> pb.RemoveAliasResponse:
        """Take an alias away."""
        change = await self._registry.remove_alias(
            request.name, request.alias, actor=request.actor, reason=request.reason
        )
        await self._catalog.refresh()
        return pb.RemoveAliasResponse(change=convert.alias_change(change))

    def PreloadAdapter(
        self, request: pb.PreloadAdapterRequest, context: Context
    ) -> AsyncGenerator[pb.PreloadAdapterResponse, None]:
        """Load and probe."""

        async def load(report: OnStage) -> pb.PreloadAdapterResponse:
            manifest = await self._fresh(request.adapter)
            await self._residency.preload(manifest, report)
            return pb.PreloadAdapterResponse(version=convert.version(manifest))

        return reported(load, pb.PreloadAdapterResponse)

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Pin or unpin."""
        if request.pinned:
            manifest = await self._fresh(request.adapter)
            await self._residency.pin(manifest)
        else:
            manifest = await self._held(request.adapter)
            await self._residency.unpin(manifest)
        return pb.PinAdapterResponse(version=convert.version(manifest))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        """Take a version out of the engine."""
        manifest = await self._held(request.adapter)
        return pb.UnloadAdapterResponse(was_resident=await self._residency.unload(manifest))

    async def DeleteVersion(self, request: pb.DeleteVersionRequest, context: Context) -> pb.DeleteVersionResponse:
        """Withdraw a version."""
        await self._registry.delete_version(request.name, request.version)
        await self._catalog.refresh()
        return pb.DeleteVersionResponse()

    async def RecordEvaluation(
        self, request: pb.RecordEvaluationRequest, context: Context
    ) -> pb.RecordEvaluationResponse:
        """Keep an evaluation beside its version."""
        record = _json_object(request.record_json, "record_json")
        sequence = await self._registry.record_evaluation(request.name, request.version, record)
        return pb.RecordEvaluationResponse(sequence=sequence)

    async def ListEvaluations(self, request: pb.ListEvaluationsRequest, context: Context) -> pb.ListEvaluationsResponse:
        """All of a version's evaluations."""
        records = await self._registry.evaluations(request.name, request.version)
        return pb.ListEvaluationsResponse(records_json=[json.dumps(record) for record in records])

    async def WatchAdapters(
        self,
        request: pb.WatchAdaptersRequest,
        context: Context,
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        """Pass the catalog's changes on, after an empty message that says that the watch has begun."""
        sees = principal().sees
        with self._catalog.subscribe() as changes:
            yield pb.WatchAdaptersResponse()
            async for change in changes:
                message = _watched(change)
                wanted = request.include_engine or not isinstance(change, InEngine)
                if wanted and request.name in ("", message.name) and sees(message.name):
                    yield message

    def _version(self, manifest: Manifest) -> pb.AdapterVersion:
        version = convert.version(manifest)
        if manifest.digest in self._residency.quarantined:
            version.warnings.insert(0, "in quarantine: an answer of it was not a number (NaN)")
        return version

    async def _fresh(self, ref: str) -> Manifest:
        await self._catalog.refresh()
        return self._catalog.resolve(AdapterRef.parse(ref))

    async def _held(self, ref: str) -> Manifest:
        """As `_fresh`, but a version that is deleted is found as long as the engine holds it."""
        try:
            return await self._fresh(ref)
        except AdapterNotFound:
            named = AdapterRef.parse(ref)
            resident = self._residency.find(named.name, named.selector)
            if resident is None:
                raise
            return resident.manifest


def _summary(view: AdapterView) -> pb.AdapterSummary:
    return pb.AdapterSummary(
        name=view.name,
        aliases=view.aliases,
        versions=list(view.manifests),
        canary=convert.canary(view.canary),
        shadow=convert.shadow(view.shadow),
    )


def _watched(change: Event) -> pb.WatchAdaptersResponse:
    match change:
        case Published(manifest=manifest):
            return pb.WatchAdaptersResponse(name=manifest.name, published=convert.version(manifest))
        case AliasChanged(name=name, change=entry):
            return pb.WatchAdaptersResponse(name=name, alias_changed=convert.alias_change(entry))
        case Deleted(name=name, version=version):
            return pb.WatchAdaptersResponse(name=name, deleted_version=version)
        case InEngine(change=kind, manifest=manifest, seconds=seconds):
            took = convert.duration(seconds) if kind == "loaded" else None
            fact = pb.EngineChange(version=manifest.version, digest=manifest.digest, took=took)
            message = pb.WatchAdaptersResponse(name=manifest.name)
            getattr(message, kind).CopyFrom(fact)
            return message


async def _header(requests: AsyncIterator[pb.PublishAdapterRequest]) -> pb.PublishHeader:
    async for request in requests:
        if request.HasField("header"):
            return request.header
        break
    raise InvalidRequest("header", "must be the first message of the upload")


def _evaluation(text: str) -> dict[str, Any] | None:
    return _json_object(text, "header.evaluation_json") if text else None


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        # Not json's, which reads what could not be read back from a manifest.
        content = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(field, "is not JSON in valid Unicode, nested at most 200 levels deep") from error
    if not isinstance(content, dict):
        raise InvalidRequest(field, "must be a JSON object")
    return content
