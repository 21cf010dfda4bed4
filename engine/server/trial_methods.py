"""AdapterService, the part that tries a version beside the current one: canaries and shadows, and their reports."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.errors import NotAllowedNow
from engine.registry.catalog import Catalog
from engine.registry.manifest import AliasChange
from engine.registry.names import CANARY, CURRENT, SHADOW, AdapterRef
from engine.registry.registry import Registry
from engine.runtime.residency import OnStage
from engine.runtime.shadow import Shadows
from engine.server import convert
from engine.server.call import Context
from engine.server.moves import Moves
from engine.server.progress import reported
from engine.server.trials import Trials


class TrialMethods:
    """The methods of AdapterService about canaries and shadows."""

    def __init__(self, registry: Registry, catalog: Catalog, moves: Moves, trials: Trials, shadows: Shadows) -> None:
        self._registry = registry
        self._catalog = catalog
        self._moves = moves
        self._trials = trials
        self._shadows = shadows

    def SetCanary(self, request: pb.SetCanaryRequest, context: Context) -> AsyncGenerator[pb.SetCanaryResponse, None]:
        """Warm the version, then give it its share, in one move of the alias log."""

        async def move(report: OnStage) -> pb.SetCanaryResponse:
            trial = convert.to_trial(request.trial) if request.HasField("trial") else None
            give = partial(self._registry.set_canary, weight=request.weight, trial=trial)
            return pb.SetCanaryResponse(change=await self._share(request, CANARY, give, report))

        return reported(move, pb.SetCanaryResponse)

    async def EndCanary(self, request: pb.EndCanaryRequest, context: Context) -> pb.EndCanaryResponse:
        """Let the current version answer alone."""
        change = await self._registry.end_canary(request.name, actor=request.actor, reason=request.reason)
        await self._catalog.refresh()
        return pb.EndCanaryResponse(change=convert.alias_change(change))

    async def GetCanaryReport(self, request: pb.GetCanaryReportRequest, context: Context) -> pb.GetCanaryReportResponse:
        """How both sides have fared here."""
        await self._catalog.refresh()
        canary = self._catalog.adapter(request.name).canary
        if canary is None:
            raise NotAllowedNow(f"{request.name} has no canary", fix="There is nothing to report on.")
        watched = self._trials.watch(canary)
        ours, current = watched.sides
        return pb.GetCanaryReportResponse(
            canary=convert.canary(canary),
            canary_side=convert.side_report(ours),
            current_side=convert.side_report(current),
            verdict=self._trials.decide(watched).why,
        )

    def SetShadow(self, request: pb.SetShadowRequest, context: Context) -> AsyncGenerator[pb.SetShadowResponse, None]:
        """Warm the version, then have it asked copies, in one move of the alias log."""

        async def move(report: OnStage) -> pb.SetShadowResponse:
            give = partial(self._registry.set_shadow, sample=request.sample)
            return pb.SetShadowResponse(change=await self._share(request, SHADOW, give, report))

        return reported(move, pb.SetShadowResponse)

    async def EndShadow(self, request: pb.EndShadowRequest, context: Context) -> pb.EndShadowResponse:
        """Copy no more requests."""
        change = await self._registry.end_shadow(request.name, actor=request.actor, reason=request.reason)
        await self._catalog.refresh()
        return pb.EndShadowResponse(change=convert.alias_change(change))

    async def GetShadowReport(self, request: pb.GetShadowReportRequest, context: Context) -> pb.GetShadowReportResponse:
        """How the shadow has answered here."""
        await self._catalog.refresh()
        view = self._catalog.adapter(request.name)
        if view.shadow is None:
            raise NotAllowedNow(f"{request.name} has no shadow", fix="There is nothing to report on.")
        return convert.shadow_report(self._shadows.report(view.shadow), view.aliases.get(CURRENT, ""))

    async def _share(
        self,
        request: pb.SetCanaryRequest | pb.SetShadowRequest,
        alias: str,
        give: Callable[..., Awaitable[AliasChange]],
        report: OnStage,
    ) -> pb.AliasChange:
        """Warm the version that the request names, or else the alias, then `give` it its share."""
        await self._catalog.refresh()
        version = self._catalog.resolve(AdapterRef(request.name, request.version or alias)).version
        based_on = self._catalog.adapter(request.name).last_move  # before the version is warmed
        switch = partial(give, request.name, version, actor=request.actor, reason=request.reason, since=based_on)
        return convert.alias_change(await self._moves.move(request.name, alias, version, switch, report))
