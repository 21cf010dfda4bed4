"""GenerationService of the router: requests go to a replica, its messages come back as they are.

Until a first message came, a request whose replica fails is simply asked elsewhere. After that the answer goes on
elsewhere, from what the caller has: same version, numbering, usage and end as if nothing had happened, and a count that
says that it did.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc import aio

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.cluster.fleet import Fleet, Link
from engine.cluster.fleet.replies import as_it_came
from engine.cluster.router.journey import Journey, Refusal
from engine.cluster.router.metadata import passed_on
from engine.cluster.router.metrics import RouterMetrics
from engine.cluster.router.sent import Sent
from engine.cluster.router.together import Pace, together
from engine.cluster.routing import Ask
from engine.errors import EngineDied, NoReplica, StreamLost
from engine.server.call import Context
from engine.server.caller import caller
from engine.server.validation import check

SERVICE = "loraplex.v1.GenerationService"
_GENERATE, _STREAM, _COUNT = (f"/{SERVICE}/{name}" for name in ("Generate", "GenerateStream", "CountTokens"))
_PREFIX = 256  # characters, or tokens, of a prompt that stand for its beginning


@dataclass(frozen=True)
class Raw:
    """A message as it came, and as it reads."""

    data: bytes
    request: Any


class GenerationForwarder:
    """Answers by asking replicas. `give_up_s` is how long a request that fails everywhere is tried again."""

    def __init__(self, fleet: Fleet, metrics: RouterMetrics, pace: Pace, give_up_s: float) -> None:
        self._pace = pace
        self._fleet = fleet
        self._metrics = metrics
        self._give_up_s = give_up_s

    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a gRPC server whose boundary hands over bytes."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, Any] = {
            "Generate": unary(self.generate, partial(_read, pb.GenerateRequest)),
            "GenerateStream": stream(self.generate_stream, partial(_read, pb.GenerateStreamRequest)),
            "CountTokens": unary(self.count_tokens, partial(_read, pb.CountTokensRequest)),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, raw: Raw, context: Context) -> bytes:
        """Ask one replica after the other until one answers."""
        return await self._unary(_GENERATE, raw, _ask(raw.request), context)

    async def count_tokens(self, raw: Raw, context: Context) -> bytes:
        """Any replica can count."""
        return await self._unary(_COUNT, raw, Ask(), context)

    async def _unary(self, method: str, raw: Raw, ask: Ask, context: Context) -> bytes:
        journey = self._journey(ask, raw.request, context)
        metadata = passed_on(context)
        try:
            while True:
                link = await journey.next()
                call = link.unary(method)(raw.data, timeout=_timeout(journey), metadata=metadata)
                try:
                    with self._fleet.sending(link, call):
                        data: bytes = await call
                except aio.AioRpcError as error:
                    await journey.failed(link, error)
                else:
                    if method == _COUNT:
                        link.succeeded()
                        return data
                    self._fleet.generated(link, journey.asked_s)
                    return self._told(data, journey)
        except Refusal as refusal:
            await context.abort(*as_it_came(refusal.error))
            raise

    async def generate_stream(self, raw: Raw, context: Context) -> AsyncIterator[bytes]:
        """Pass a stream on that outlives its replica."""
        sent = Sent(raw.request)
        journey = self._journey(_ask(raw.request), raw.request, context)
        metadata = passed_on(context)
        try:
            answer = self._whole(raw.data, sent, journey, metadata)
            async with aclosing(together(answer, self._pace)) as messages:
                async for data in messages:
                    yield data
        except Refusal as refusal:
            if sent.count and refusal.error.code() is grpc.StatusCode.UNAVAILABLE:
                raise _lost(sent, str(refusal.error.details())) from refusal
            await context.abort(*as_it_came(refusal.error))
        except (NoReplica, EngineDied) as error:
            if not sent.count:
                raise
            raise _lost(sent, error.message) from error
        finally:
            if journey.failovers:
                self._metrics.failed_over(journey.failovers, resumed=sent.count > 0)

    async def _whole(self, data: bytes, sent: Sent, journey: Journey, metadata: Any) -> AsyncGenerator[bytes, None]:
        """A replica's stream, and when it breaks that of another one which goes on where it broke."""
        async with aclosing(self._first(data, sent, journey, metadata)) as messages:
            async for message in messages:
                yield message
        while not sent.complete:
            async with aclosing(self._rest(sent, journey, metadata)) as messages:
                async for message in messages:
                    yield message

    async def _first(self, data: bytes, sent: Sent, journey: Journey, metadata: Any) -> AsyncGenerator[bytes, None]:
        """The stream of the first replica that begins to answer, until its end or until it breaks."""
        while not sent.count:
            link = await journey.next()
            call = link.stream(_STREAM)(data, timeout=_timeout(journey), metadata=metadata)
            try:
                with self._fleet.sending(link, call):
                    async for message in call:
                        if not sent.count:
                            journey.progressed()
                        told = _with_failovers(message, journey)
                        sent.add(told)
                        yield told
            except aio.AioRpcError as error:
                await self._broke(sent, journey, link, error)
            else:
                self._fleet.generated(link, journey.asked_s)
                sent.complete = True
                return

    async def _rest(self, sent: Sent, journey: Journey, metadata: Any) -> AsyncGenerator[bytes, None]:
        """What the next replica has to say, as the stream goes on."""
        journey.resuming(sent.base)
        before = sent.count
        request = pb.GenerateStreamRequest(request=sent.request_for_the_rest())
        link = await journey.next()
        call = link.stream(_STREAM)(request.SerializeToString(), timeout=_timeout(journey), metadata=metadata)
        try:
            with self._fleet.sending(link, call):
                async for data in call:
                    journey.progressed()
                    message = sent.renumbered(data)
                    if message.HasField("usage"):
                        _settle(message, journey, journey.first_token_s)
                    renumbered = message.SerializeToString()
                    sent.add(renumbered)
                    yield renumbered
        except aio.AioRpcError as error:
            await self._broke(sent, journey, link, error, before)
        else:
            self._fleet.generated(link, journey.asked_s)
            sent.complete = True

    async def _broke(self, sent: Sent, journey: Journey, link: Link, error: aio.AioRpcError, before: int = 0) -> None:
        """A stream broke, `before` messages of which others had sent: if only its end is missing, that is all; else go on."""
        sent.complete = sent.count > 0 and sent.finished
        if not sent.complete:
            await journey.failed(link, error, sent.count - before)

    def _journey(self, ask: Ask, request: Any, context: Context) -> Journey:
        adapter, begun_by = "", ""
        if isinstance(request, pb.GenerateRequest):
            adapter, begun_by = request.adapter, request.resume.base_fingerprint
        return Journey(self._fleet, ask, adapter, caller(context).deadline, self._give_up_s, begun_by)

    def _told(self, data: bytes, journey: Journey) -> bytes:
        """An answer, with the count of failovers and the caller's own times."""
        if not journey.failovers:
            return data
        self._metrics.failed_over(journey.failovers, resumed=False)
        answer = pb.GenerateResponse.FromString(data)
        first_token_s = answer.timings.time_to_first_token.ToNanoseconds() / 1e9 + journey.lost_s
        _settle(answer, journey, first_token_s)
        return answer.SerializeToString()


def _lost(sent: Sent, why: str) -> StreamLost:
    """The end of a stream with whose answer the last replica could not go on: it knew only of its own part."""
    return StreamLost(sent.tokens, f"no other one could go on with its answer: {why}")


def _with_failovers(data: bytes, journey: Journey) -> bytes:
    """A stream's message; if it is the last one, with the count of failovers and the caller's own times."""
    if not journey.failovers or not (message := pb.GenerateStreamResponse.FromString(data)).HasField("usage"):
        return data
    _settle(message, journey, journey.first_token_s)
    return message.SerializeToString()


def _settle(message: Any, journey: Journey, first_token_s: float) -> None:
    """What the last message says about the whole answer: a replica knows only of what it was asked itself."""
    message.failovers = journey.failovers
    message.timings.total.FromNanoseconds(int(journey.elapsed_s * 1e9))
    message.timings.time_to_first_token.FromNanoseconds(int(first_token_s * 1e9))


def _ask(request: pb.GenerateRequest) -> Ask:
    name, _, version = request.adapter.partition("@")
    if name:
        return Ask(name, version if version.startswith("v") and version[1:].isdecimal() else "")
    return Ask(prefix=_beginning(request))


def _beginning(request: pb.GenerateRequest) -> str:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text[:_PREFIX]
        case "chat":
            return "\n".join(turn.content[:_PREFIX] for turn in request.chat.messages[:1])
        case _:
            return str(request.token_ids.ids[:_PREFIX])


def _timeout(journey: Journey) -> float | None:
    remaining = journey.remaining_s
    return None if remaining == float("inf") else max(0.0, remaining)


def _read(kind: Any, data: bytes) -> Raw:
    message = kind.FromString(data)
    check(message)
    return Raw(data, getattr(message, "request", message))
