"""AdapterService of the router.

The registry is shared, so any replica can read and write it; what happens inside engines has to happen on all of them. A
move (promotion, rollback, canary) loads and probes the version wherever it will be asked for (who holds the adapter already,
and who is preferred for it), and only then moves the alias; if one of them cannot, nothing has moved. Preloads, pins and
unloads go to every replica of the version's base. Whatever has changed, every replica is made to look into the registry
before the caller hears of it; one that does not find an alias's new version there is named to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
from grpc import StatusCode, aio

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import adapters_pb2_grpc
from engine.cluster.fleet import Fleet, Link
from engine.cluster.fleet.replies import as_it_came, words
from engine.cluster.router.asking import LOAD_S, Asking, pass_on_denial
from engine.cluster.router.metadata import passed_on
from engine.cluster.router.uploads import Upload
from engine.errors import AdapterNotFound, NotAllowedNow, NotEverywhere, ReplicaLost, StreamLost
from engine.registry.aliases import version_before
from engine.registry.names import CANARY, CURRENT, SHADOW
from engine.server.call import Context

log = structlog.get_logger(__name__)

_FOLLOW_FIX = (
    "See to the named replicas' way to the registry, or drain them: they follow by themselves, do not ask again."
)


def _anywhere(method: str) -> Callable[[AdapterFanOut, Any, Context], Awaitable[Any]]:
    """A method that any replica can answer, and another one if that dies of it: nothing is done twice."""

    async def ask(self: AdapterFanOut, request: Any, context: Context) -> Any:
        return await self._asking.one(method, request, context)

    return ask


def _writes(method: str) -> Callable[[AdapterFanOut, Any, Context], Awaitable[Any]]:
    """A change that one replica makes in the registry, which they share. Then all look at it, whatever became of the one."""

    async def ask(self: AdapterFanOut, request: Any, context: Context) -> Any:
        try:
            lost = ReplicaLost(f"{method} of {request.name}")
            response = await self._asking.once(method, request, context, lost)
        except (ReplicaLost, asyncio.CancelledError):
            await self._tell_all(request.name)  # it may have been done
            raise
        await self._tell_all(request.name, getattr(response, "change", None))
        return response

    return ask


class AdapterFanOut(adapters_pb2_grpc.AdapterServiceServicer):
    """Asks one replica, or all that it concerns."""

    ListAdapters = _anywhere("ListAdapters")
    GetAdapter = _anywhere("GetAdapter")
    ListEvaluations = _anywhere("ListEvaluations")
    RecordEvaluation = _anywhere("RecordEvaluation")  # the same record is kept once
    RemoveAlias = _writes("RemoveAlias")
    EndCanary = _writes("EndCanary")
    EndShadow = _writes("EndShadow")
    DeleteVersion = _writes("DeleteVersion")

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._asking = Asking(fleet)
        self._telling: set[asyncio.Task[None]] = set()

    async def GetCanaryReport(self, request: Any, context: Context) -> Any:
        """Of the replica that has seen most of it: each judges by itself."""
        return await self._asking.most("GetCanaryReport", request, context, lambda report: report.canary_side.requests)

    async def GetShadowReport(self, request: Any, context: Context) -> Any:
        """Of the replica that has seen most of it."""
        return await self._asking.most("GetShadowReport", request, context, lambda report: report.drawn)

    async def WatchAdapters(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """One replica's watch; it ends if that replica does, as changes may be missed then."""
        lost = StreamLost(0, "changes may be missed")
        async for message in self._asking.stream("WatchAdapters", request, context, self._asking.least_busy(), lost):
            yield message

    async def PublishAdapter(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """To one replica of the base that it names, or else of the fleet's main one; then known to all."""
        first = await anext(requests, None)
        header = first.header if first else pb.PublishHeader()
        link = self._asking.least_busy(header.base_fingerprint or next(iter(self._fleet.replicas.bases()), ""))
        channel = self._fleet.access.upload_channel(link.address)
        upload = Upload(channel, _again(first, requests), passed_on(context))
        async with upload as responses:
            try:
                with link.under_way(upload):
                    async for response in responses:
                        if response.HasField("version"):
                            await self._tell_all(response.version.name)
                        yield response
            except aio.AioRpcError as error:
                given_up = error.code() is StatusCode.CANCELLED  # by us, for the caller is still here
                if given_up or self._asking.gone(link, error):
                    await self._tell_all(header.name)  # it may have been done
                    raise ReplicaLost(f"the publication of {header.name}") from error
                await context.abort(*as_it_came(error))

    async def SetAlias(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Warm, then switch."""
        version = await self._version(request.name, request.version, context)
        async for message in self._move("SetAlias", request, version, context, pb.SetAliasResponse):
            yield message

    async def RollbackAlias(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Warm what the alias named before, then switch back, unless it has moved meanwhile: nobody warmed that."""
        found = await self._asking.one("GetAdapter", pb.GetAdapterRequest(name=request.name), context)
        alias = request.alias or CURRENT
        version = _before(found, alias)
        request.expected_version = request.expected_version or found.adapter.aliases.get(alias, "")
        async for message in self._move("RollbackAlias", request, version, context, pb.RollbackAliasResponse):
            yield message

    async def SetCanary(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Warm, then split."""
        version = await self._version(request.name, request.version or CANARY, context)
        async for message in self._move("SetCanary", request, version, context, pb.SetCanaryResponse):
            yield message

    async def SetShadow(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Warm, then copy."""
        version = await self._version(request.name, request.version or SHADOW, context)
        async for message in self._move("SetShadow", request, version, context, pb.SetShadowResponse):
            yield message

    async def PreloadAdapter(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Load and probe on every replica that gets requests."""
        name, _, version = request.adapter.partition("@")
        manifest = await self._version(name, version, context)
        links = self._asking.serving(manifest)
        async for progress in self._warm(manifest, links, "nothing else has changed", context):
            yield pb.PreloadAdapterResponse(progress=progress)
        yield pb.PreloadAdapterResponse(version=manifest)

    async def PinAdapter(self, request: Any, context: Context) -> Any:
        """Pin or unpin on every replica."""
        name, _, version = request.adapter.partition("@")
        manifest = await self._version(name, version, context)
        what = f"{'pin' if request.pinned else 'unpin'} {manifest.name}@{manifest.version}"
        links = self._asking.all_serving(manifest)
        answers = await self._asking.everywhere("PinAdapter", request, links, what, context)
        return answers[0]

    async def UnloadAdapter(self, request: Any, context: Context) -> Any:
        """Unload on every replica."""
        name, _, version = request.adapter.partition("@")
        manifest = await self._version(name, version, context)
        what = f"unload {manifest.name}@{manifest.version}"
        links = self._asking.all_serving(manifest)
        answers = await self._asking.everywhere("UnloadAdapter", request, links, what, context)
        return pb.UnloadAdapterResponse(was_resident=any(answer.was_resident for answer in answers))

    async def _move(
        self, method: str, request: Any, manifest: Any, context: Context, response: Any
    ) -> AsyncIterator[Any]:
        """Warm `manifest` where it will be asked for, then have one of those replicas move the alias."""
        links = await self._asked_for(manifest) if manifest else [self._asking.least_busy()]
        if manifest:
            async for progress in self._warm(manifest, links, "the alias has not moved", context):
                yield response(progress=progress)
        lost = ReplicaLost(f"a move of {request.name}'s aliases")
        try:
            async for message in self._asking.stream(method, request, context, links[0], lost):
                if message.HasField("change"):
                    await self._tell_all(request.name, message.change)
                if not message.HasField("progress") or message.progress.stage == "switching":
                    yield message
        except (ReplicaLost, asyncio.CancelledError):
            await self._tell_all(request.name)  # it may have been done
            raise

    async def _warm(
        self, manifest: Any, links: list[Link], outcome: str, context: Context
    ) -> AsyncIterator[pb.Progress]:
        """Load and probe on each, telling how many have it. Raises NotEverywhere."""
        ref = f"{manifest.name}@{manifest.version}"
        request = pb.PreloadAdapterRequest(adapter=ref)
        metadata = passed_on(context)

        async def preload(link: Link) -> None:
            async for _ in link.adapter_stream("PreloadAdapter", request, timeout=LOAD_S, metadata=metadata):
                pass

        tasks = {asyncio.create_task(preload(link)): link for link in links}
        failures: dict[str, str] = {}
        errors: list[aio.AioRpcError] = []
        done = 0
        try:
            for finished in asyncio.as_completed(list(tasks)):
                try:
                    await finished
                    done += 1
                except aio.AioRpcError as error:
                    errors.append(error)
                    failures |= _whose(tasks, error)
                yield _progress(f"{ref} is ready on {done} of {len(links)} replicas", 0.8 * done / len(links))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if failures:
            await pass_on_denial(errors, context)
            raise NotEverywhere(f"load {ref}", done, failures, outcome)

    async def _version(self, name: str, version: str, context: Context) -> Any:
        """A version, or what an alias names (empty: `current`), as its manifest says."""
        found = await self._asking.one("GetAdapter", pb.GetAdapterRequest(name=name), context)
        wanted = found.adapter.aliases.get(version or CURRENT, version)
        manifest = next((one for one in found.versions if one.version == wanted), None)
        if manifest is None:
            raise AdapterNotFound(
                f"{name}@{version or CURRENT}", [f"{name}@{one.version}" for one in found.versions[-3:]]
            )
        return manifest

    async def _tell_all(self, name: str, change: pb.AliasChange | None = None) -> None:
        """Have every replica look into the registry, also if the caller leaves; one that is away looks when it is back.

        Raises NotEverywhere if one that can be reached goes on without knowing of an alias's `change`.
        """
        task = asyncio.create_task(self._tell(name, change))
        self._telling.add(task)
        task.add_done_callback(self._told)
        await asyncio.shield(task)

    def _told(self, task: asyncio.Task[None]) -> None:
        self._telling.discard(task)
        if not task.cancelled():
            task.exception()  # nobody else may ask for it

    async def _tell(self, name: str, change: pb.AliasChange | None) -> None:
        links = self._fleet.members()
        move = change.sequence if change else 0
        whys = await asyncio.gather(*(self._asking.follow(link, name, move) for link in links))
        late = {link: why for link, why in zip(links, whys, strict=True) if why}
        if late:
            log.warning(
                "replicas that will notice a change by themselves",
                adapter=name,
                replicas=[link.address for link in late],
            )
        if change and (failures := {link.address: why for link, why in late.items() if link.there}):
            what, outcome = f"change of {name}@{change.alias}", "and stands; the others may answer as before it"
            raise NotEverywhere(what, len(links) - len(late), failures, outcome, fix=_FOLLOW_FIX)

    async def _asked_for(self, manifest: Any) -> list[Link]:
        """Where requests for the version will go: who holds any version of it at this moment, and who is preferred."""
        await asyncio.gather(*map(self._fleet.look, self._fleet.usable()))
        owners = {one.id for one in self._fleet.chooser.owners(manifest.name, manifest.base_fingerprint)}
        return [
            one for one in self._asking.serving(manifest) if one.replica.holds(manifest.name) or one.address in owners
        ]


async def _again(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream whose first message was read."""
    if first is not None:
        yield first
    async for message in rest:
        yield message


def _before(found: pb.GetAdapterResponse, alias: str) -> Any:
    """What a rollback would go back to; None if there is nothing, and the replica says what is wrong."""
    versions = {one.version: one for one in found.versions}
    try:
        return versions[version_before(found.adapter.name, alias, found.history, versions)]
    except (AdapterNotFound, NotAllowedNow):
        return None


def _progress(detail: str, fraction: float) -> pb.Progress:
    return pb.Progress(stage="loading", detail=detail, fraction=fraction)


def _whose(tasks: dict[Any, Link], error: aio.AioRpcError) -> dict[str, str]:
    """Which replica's call ended with this error, and why."""
    return {link.address: words(error) for task, link in tasks.items() if task.done() and task.exception() is error}
