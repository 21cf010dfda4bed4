"""Administration of adapters: versions, aliases, and what is in the engine's memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.client.channel import MEBIBYTE, R, Wire
from engine.client.errors import RequestError, StreamBroken, translated

_LONG_S = 600.0  # deadline in seconds of what loads or uploads an adapter

OnProgress = Callable[[pb.Progress], None]
E = TypeVar(
    "E",
    pb.PublishAdapterResponse,
    pb.SetAliasResponse,
    pb.RollbackAliasResponse,
    pb.SetCanaryResponse,
    pb.SetShadowResponse,
    pb.PreloadAdapterResponse,
)  # the last message of each carries the result, the others carry progress


class Adapters:
    """Publishes adapters and decides which version answers. Results are messages of loraplex/v1/adapters.proto.

    A `ref` is "support" (its current version), "support@v2" or "support@canary". `timeout_s` is each call's deadline in
    seconds. `on_progress` is called with every step of long work.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def list(self, *, timeout_s: float | None = None) -> Sequence[pb.AdapterSummary]:
        """All adapters, by name, with their versions and aliases."""
        request = pb.ListAdaptersRequest()
        return (await self._call("ListAdapters", request, pb.ListAdaptersResponse, timeout_s)).adapters

    async def get(self, name: str, *, timeout_s: float | None = None) -> pb.GetAdapterResponse:
        """One adapter: its versions, its aliases and every alias move so far."""
        return await self._call("GetAdapter", pb.GetAdapterRequest(name=name), pb.GetAdapterResponse, timeout_s)

    async def publish(
        self,
        folder: str | Path,
        name: str,
        version: str | None = None,
        base_fingerprint: str = "",
        run_id: str = "",
        publisher: str = "",
        notes: str = "",
        evaluation: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
        *,
        timeout_s: float = _LONG_S,
    ) -> pb.AdapterVersion:
        """Upload every file of a PEFT adapter's folder (not of folders inside it) as a version of adapter `name`.

        Left out: `version` means the next free one, `base_fingerprint` the one in run.json, or the server's.
        Nothing is visible until the server has checked it all. A failed publication is not tried again by itself.
        """
        header = pb.PublishHeader(
            name=name,
            version=version or "",
            base_fingerprint=base_fingerprint,
            run_id=run_id,
            publisher=publisher,
            notes=notes,
            evaluation_json="" if evaluation is None else json.dumps(evaluation, ensure_ascii=False),
        )
        files = await asyncio.to_thread(_files, Path(folder))
        failures: list[OSError] = []
        parts = _parts(header, files, failures)
        try:
            async with self._wire.upload(
                "AdapterService/PublishAdapter", parts, pb.PublishAdapterResponse, timeout_s
            ) as replies:
                return (await _result(replies, on_progress)).version
        except RequestError:
            if failures:
                raise failures[0] from None
            raise

    async def promote(
        self,
        name: str,
        version: str,
        alias: str = "current",
        expected_version: str = "",
        actor: str = "",
        reason: str = "",
        on_progress: OnProgress | None = None,
        *,
        timeout_s: float = _LONG_S,
    ) -> pb.AliasChange:
        """Load and probe a version, then point `alias` at it; Aborted if that does not name `expected_version` now."""
        request = pb.SetAliasRequest(
            name=name, alias=alias, version=version, expected_version=expected_version, actor=actor, reason=reason
        )
        return (await self._long("SetAlias", request, pb.SetAliasResponse, on_progress, timeout_s)).change

    async def rollback(
        self,
        name: str,
        alias: str = "current",
        actor: str = "",
        reason: str = "",
        on_progress: OnProgress | None = None,
        *,
        expected: str = "",
        timeout_s: float = _LONG_S,
    ) -> pb.AliasChange:
        """Point `alias` back at the version that it named before; with `expected`, only if it names that one now."""
        request = pb.RollbackAliasRequest(name=name, alias=alias, actor=actor, reason=reason, expected_version=expected)
        return (await self._long("RollbackAlias", request, pb.RollbackAliasResponse, on_progress, timeout_s)).change

    async def set_canary(
        self,
        name: str,
        weight: float,
        version: str = "",
        actor: str = "",
        reason: str = "",
        on_progress: OnProgress | None = None,
        *,
        trial: pb.CanaryTrial | None = None,
        timeout_s: float = _LONG_S,
    ) -> pb.AliasChange:
        """Load and probe a version, then let it answer a share `weight`, 0 to 1, of what bare `name` is asked.

        Left out, `version` is the one that the alias "canary" names now: to change the weight. With a `trial` (see `trial`) the
        servers judge it, and end or promote it by themselves.
        """
        request = pb.SetCanaryRequest(
            name=name, version=version, weight=weight, actor=actor, reason=reason, trial=trial
        )
        return (await self._long("SetCanary", request, pb.SetCanaryResponse, on_progress, timeout_s)).change

    async def end_canary(
        self, name: str, actor: str = "", reason: str = "", *, timeout_s: float | None = None
    ) -> pb.AliasChange:
        """Let "current" answer alone again; FailedPrecondition when no canary stands."""
        request = pb.EndCanaryRequest(name=name, actor=actor, reason=reason)
        return (await self._call("EndCanary", request, pb.EndCanaryResponse, timeout_s)).change

    async def canary_report(self, name: str, *, timeout_s: float | None = None) -> pb.GetCanaryReportResponse:
        """How the canary that stands fares beside "current", as this server has seen it."""
        request = pb.GetCanaryReportRequest(name=name)
        return await self._call("GetCanaryReport", request, pb.GetCanaryReportResponse, timeout_s)

    async def set_shadow(
        self,
        name: str,
        sample: float,
        version: str = "",
        actor: str = "",
        reason: str = "",
        on_progress: OnProgress | None = None,
        *,
        timeout_s: float = _LONG_S,
    ) -> pb.AliasChange:
        """Load and probe a version, then ask it a copy of a share `sample`, 0 to 1, of what bare `name` is asked.

        Left out, `version` is the one that the alias "shadow" names now: to change the share. Nobody gets its answers: they are
        compared with those of the current version (`shadow_report`) and dropped.
        """
        request = pb.SetShadowRequest(name=name, version=version, sample=sample, actor=actor, reason=reason)
        return (await self._long("SetShadow", request, pb.SetShadowResponse, on_progress, timeout_s)).change

    async def end_shadow(
        self, name: str, actor: str = "", reason: str = "", *, timeout_s: float | None = None
    ) -> pb.AliasChange:
        """Copy no more requests; FailedPrecondition when no shadow stands."""
        request = pb.EndShadowRequest(name=name, actor=actor, reason=reason)
        return (await self._call("EndShadow", request, pb.EndShadowResponse, timeout_s)).change

    async def shadow_report(self, name: str, *, timeout_s: float | None = None) -> pb.GetShadowReportResponse:
        """How the shadow that stands answers beside "current", as this server has seen it."""
        request = pb.GetShadowReportRequest(name=name)
        return await self._call("GetShadowReport", request, pb.GetShadowReportResponse, timeout_s)

    async def remove_alias(
        self, name: str, alias: str, actor: str = "", reason: str = "", *, timeout_s: float | None = None
    ) -> pb.AliasChange:
        """Take an alias away; "current" cannot be removed."""
        request = pb.RemoveAliasRequest(name=name, alias=alias, actor=actor, reason=reason)
        return (await self._call("RemoveAlias", request, pb.RemoveAliasResponse, timeout_s)).change

    async def preload(
        self, ref: str, on_progress: OnProgress | None = None, *, timeout_s: float = _LONG_S
    ) -> pb.AdapterVersion:
        """Load a version into the engine, so that its first request does not wait."""
        request = pb.PreloadAdapterRequest(adapter=ref)
        return (await self._long("PreloadAdapter", request, pb.PreloadAdapterResponse, on_progress, timeout_s)).version

    async def pin(self, ref: str, pinned: bool = True, *, timeout_s: float = _LONG_S) -> pb.AdapterVersion:
        """Keep a version in the engine, or (`pinned` false) let it go again."""
        request = pb.PinAdapterRequest(adapter=ref, pinned=pinned)
        return (await self._call("PinAdapter", request, pb.PinAdapterResponse, timeout_s)).version

    async def unload(self, ref: str, *, timeout_s: float | None = None) -> bool:
        """Take a version out of the engine's memory; tells whether it had been there."""
        request = pb.UnloadAdapterRequest(adapter=ref)
        return (await self._call("UnloadAdapter", request, pb.UnloadAdapterResponse, timeout_s)).was_resident

    async def delete_version(self, name: str, version: str, *, timeout_s: float | None = None) -> None:
        """Withdraw a version for good; FailedPrecondition while an alias names it."""
        request = pb.DeleteVersionRequest(name=name, version=version)
        await self._call("DeleteVersion", request, pb.DeleteVersionResponse, timeout_s)

    async def record_evaluation(
        self, name: str, version: str, record: Mapping[str, Any], *, timeout_s: float | None = None
    ) -> int:
        """Keep what an evaluation of a version found, beside the version; returns its number."""
        request = pb.RecordEvaluationRequest(name=name, version=version, record_json=json.dumps(record))
        return (await self._call("RecordEvaluation", request, pb.RecordEvaluationResponse, timeout_s)).sequence

    async def evaluations(self, name: str, version: str, *, timeout_s: float | None = None) -> Sequence[dict[str, Any]]:
        """What evaluations of a version found, oldest first."""
        request = pb.ListEvaluationsRequest(name=name, version=version)
        response = await self._call("ListEvaluations", request, pb.ListEvaluationsResponse, timeout_s)
        return [json.loads(record) for record in response.records_json]

    async def watch(
        self, name: str = "", *, include_engine: bool = False, timeout_s: float = float("inf")
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        """Changes from now on, of one adapter or of all. The first message has no change: the watch has begun.

        With `include_engine` also loads, evictions and quarantines of this server's engine.
        """
        request = pb.WatchAdaptersRequest(name=name, include_engine=include_engine)
        call = self._wire.stream("AdapterService/WatchAdapters", request, pb.WatchAdaptersResponse, timeout_s)
        try:
            with translated():
                async for message in call:
                    yield message
        finally:
            call.cancel()

    async def _call(self, method: str, request: Any, reply: type[R], timeout_s: float | None) -> R:
        return await self._wire.unary(f"AdapterService/{method}", request, reply, timeout_s)

    async def _long(
        self, method: str, request: Any, reply: type[E], on_progress: OnProgress | None, timeout_s: float
    ) -> E:
        call = self._wire.stream(f"AdapterService/{method}", request, reply, timeout_s)
        try:
            return await _result(call, on_progress)
        finally:
            call.cancel()


def trial(
    duration_s: float,
    max_error_rate: float | None = None,
    max_ttft_ratio: float | None = None,
    *,
    promote: bool = False,
) -> pb.CanaryTrial:
    """How to judge a canary: ended when it fails more or is slower than that, and after `duration_s` ended or promoted.

    Left out, the bounds are the server's: 0.02 of the requests, 1.5 times the current version's time to first token.
    """
    then = pb.AFTER_TRIAL_PROMOTE if promote else pb.AFTER_TRIAL_END
    made = pb.CanaryTrial(max_error_rate=max_error_rate, max_ttft_ratio=max_ttft_ratio, then=then)
    made.duration.FromMicroseconds(round(duration_s * 1_000_000))
    return made


async def _result(events: AsyncIterable[E], on_progress: OnProgress | None) -> E:
    """The one event that is no progress; the progress goes to `on_progress`."""
    result: E | None = None
    with translated():
        async for event in events:
            if event.WhichOneof("event") != "progress":
                result = event
            elif on_progress:
                on_progress(event.progress)
    if result is None:
        raise StreamBroken("the stream ended without its result")
    return result


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _parts(
    header: pb.PublishHeader, files: Sequence[Path], failures: list[OSError]
) -> Iterator[pb.PublishAdapterRequest]:
    """The messages of an upload; an empty file is one empty chunk. gRPC hides what fails here: see `failures`."""
    yield pb.PublishAdapterRequest(header=header)
    try:
        for path in files:
            with path.open("rb") as file:
                data = file.read(MEBIBYTE)
                yield pb.PublishAdapterRequest(chunk=pb.FileChunk(path=path.name, data=data))
                while data := file.read(MEBIBYTE):
                    yield pb.PublishAdapterRequest(chunk=pb.FileChunk(path=path.name, data=data))
    except OSError as error:
        failures.append(error)
        raise
