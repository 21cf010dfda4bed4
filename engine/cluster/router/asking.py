"""How the replicas are asked about adapters: one, one of a base, the one that has seen most, or all of several."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from grpc import StatusCode, aio

from engine.cluster.fleet import Fleet, Link
from engine.cluster.fleet.replies import answer_or_error, as_it_came, words
from engine.cluster.router.journey import Failure, error_info, judge
from engine.cluster.router.metadata import passed_on
from engine.errors import LoraplexError, NoReplica, NotEverywhere
from engine.server.call import Context

LOAD_S = 120.0  # for loading and probing a version on one replica
_FOLLOW_S, _LOOK_S = 3.0, 0.2  # for a replica to find a change in the registry, and between its looks
_SLOW_S = 15.0  # for one look: a store may be slow
_ABOUT_CALLER = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)


class Asking:
    """Calls replicas on a caller's behalf. What a replica refuses ends the caller's own call, with its status as it came."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def one(self, method: str, request: Any, context: Context) -> Any:
        """Any replica's answer; the next one's if that cannot be reached, or dies of it. Raises NoReplica."""
        metadata = passed_on(context)
        links = self._fleet.usable()
        for link in links:
            try:
                return await link.adapter_call(method, request, timeout=LOAD_S, metadata=metadata)
            except aio.AioRpcError as error:
                if not self.gone(link, error):
                    await context.abort(*as_it_came(error))
        raise NoReplica

    async def once(self, method: str, request: Any, context: Context, lost: LoraplexError) -> Any:
        """One replica's answer. Raises NoReplica, and `lost` if it goes away meanwhile."""
        link = self.least_busy()
        try:
            return await link.adapter_call(method, request, timeout=LOAD_S, metadata=passed_on(context))
        except aio.AioRpcError as error:
            if self.gone(link, error):
                raise lost from error
            await context.abort(*as_it_came(error))

    async def stream(
        self, method: str, request: Any, context: Context, link: Link, lost: LoraplexError
    ) -> AsyncIterator[Any]:
        """What one replica has to say. Raises `lost` if it goes away meanwhile."""
        try:
            async with aclosing(link.adapter_stream(method, request, metadata=passed_on(context))) as messages:
                async for message in messages:
                    yield message
        except aio.AioRpcError as error:
            if self.gone(link, error):
                raise lost from error
            await context.abort(*as_it_came(error))

    def gone(self, link: Link, error: aio.AioRpcError) -> bool:
        """Whether a call ended because its replica went away; then nobody else is sent there until a look succeeds."""
        if judge(error, error_info(error).reason) is not Failure.GONE:
            return False
        self._fleet.failed(link)
        return True

    async def most(self, method: str, request: Any, context: Context, seen: Callable[[Any], int]) -> Any:
        """The answer of the replica that has seen most; if all refuse, why."""
        answers = await _answers(self._fleet.usable(), method, request, context)
        good = [answer for answer in answers if not isinstance(answer, aio.AioRpcError)]
        return max(good, key=seen) if good else await self.one(method, request, context)

    async def everywhere(self, method: str, request: Any, links: list[Link], what: str, context: Context) -> list[Any]:
        """What all of these answer. Raises NotEverywhere if some are away or refuse, unless they refuse the caller."""
        asked = [link for link in links if link.reachable]
        answers = await _answers(asked, method, request, context)
        failures = {link.address: link.why for link in links if not link.reachable}
        for link, answer in zip(asked, answers, strict=True):
            if isinstance(answer, aio.AioRpcError):
                failures[link.address] = words(answer)
        good = [answer for answer in answers if not isinstance(answer, aio.AioRpcError)]
        if failures:
            await pass_on_denial(answers, context)
            raise NotEverywhere(what, len(good), failures, "and it stands there")
        return good

    async def follow(self, link: Link, name: str, move: int) -> str:
        """Have a replica look into the registry until it knows of this move of the adapter's aliases (0: just look).

        Returns why it does not know of it, seconds later; empty if it does.
        """
        until = time.monotonic() + _FOLLOW_S
        while True:
            try:
                found = await self._fleet.adapter(link, name, _SLOW_S)
            except aio.AioRpcError as error:
                self.gone(link, error)
                why = words(error)
            else:
                if not move or any(one.sequence >= move for one in found.history):
                    return ""
                why = "it does not find it in the registry"
            if not move or not link.there or time.monotonic() > until:
                return why
            await asyncio.sleep(_LOOK_S)

    def least_busy(self, base: str = "") -> Link:
        """The least busy replica of a base, or of all if it has none: that one says what is wrong. Raises NoReplica."""
        links = _of(base, self._fleet.usable()) or self._fleet.usable()
        if not links:
            raise NoReplica
        return min(links, key=lambda link: link.replica.active)

    def serving(self, manifest: Any) -> list[Link]:
        """The replicas that get requests for a version: those of its base. Raises NoReplica."""
        return _some_of(manifest.base_fingerprint, self._fleet.usable())

    def all_serving(self, manifest: Any) -> list[Link]:
        """The same, with those that get none just now and will again. Raises NoReplica."""
        return _some_of(manifest.base_fingerprint, self._fleet.members())


def _of(base: str, links: list[Link]) -> list[Link]:
    return [link for link in links if link.replica.report.base == base]


def _some_of(base: str, links: list[Link]) -> list[Link]:
    if not (found := _of(base, links)):
        raise NoReplica(base)
    return found


async def _answers(links: list[Link], method: str, request: Any, context: Context) -> list[Any]:
    """What each replica answers, or the error that it ends with."""
    metadata = passed_on(context)
    calls = (link.adapter_call(method, request, timeout=LOAD_S, metadata=metadata) for link in links)
    return list(await asyncio.gather(*map(answer_or_error, calls)))


async def pass_on_denial(answers: list[Any], context: Context) -> None:
    """End the call with a replica's own status if that is about the caller, of whom every replica thinks the same."""
    for answer in answers:
        if isinstance(answer, aio.AioRpcError) and answer.code() in _ABOUT_CALLER:
            await context.abort(*as_it_came(answer))
