"""The connection to one replica, whose messages pass as bytes, and the judgement whether it gets requests."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from grpc import ChannelConnectivity, StatusCode, aio

from engine.api.loraplex.v1 import adapters_pb2_grpc
from engine.cluster.fleet.access import NO_ACCESS, Access
from engine.cluster.routing import Replica

_FAILURES = 3  # in a row, from which on a replica that says it is well is not believed
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Link:
    """One replica. Its `replica` is what the routing knows of it."""

    def __init__(self, address: str, access: Access = NO_ACCESS) -> None:
        self.address = address
        self.own = access.metadata  # for calls of the router's own
        self.replica = Replica(address)
        self.reachable = False  # by the latest look
        self.doubted = True  # a request failed there since, or there was no look yet
        self.silent = 0  # looks in a row that had no answer
        self.problem = "it has not answered yet"  # by the latest look; empty if there was none
        self.told: tuple[object, ...] = ()  # what the log says of it
        self.calls: set[Any] = set()  # under way, each with a `cancel`
        self.channel = access.channel(address)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self._methods: dict[str, Any] = {}
        self._failures = 0
        self._failed_at = 0.0
        self._pause_s = _PAUSE_S
        self._closed_until = 0.0

    @property
    def trusted(self) -> bool:
        """Whether it gets requests: it was reachable at the latest look, has failed none since, and not too many of late."""
        return self.there and time.monotonic() >= self._closed_until

    @property
    def there(self) -> bool:
        """Whether all that was last seen of it speaks for its being there."""
        return self.reachable and not self.doubted

    @property
    def why(self) -> str:
        """Why it gets no requests; empty if it gets some."""
        if self.problem or self.replica.usable:
            return self.problem
        if self.doubted:
            return "a request failed there"
        return "it drains" if self.replica.report.draining else "requests fail there"

    @property
    def connected(self) -> bool:
        """Whether a call that is made now reaches it."""
        return self.channel.get_state() is ChannelConnectivity.READY

    def unary(self, method: str) -> Any:
        """The method as a call from bytes to bytes."""
        if method not in self._methods:
            self._methods[method] = self.channel.unary_unary(method)
        return self._methods[method]

    def stream(self, method: str) -> Any:
        """The method as a call from bytes to a stream of bytes."""
        if method not in self._methods:
            self._methods[method] = self.channel.unary_stream(method)
        return self._methods[method]

    @contextmanager
    def under_way(self, call: Any) -> Iterator[None]:
        """Let `give_up` end a call for the time of the block; it is cancelled at the end if it has not ended.

        Raises AioRpcError (UNAVAILABLE) when it is given up, as if it had failed by itself.
        """
        self.calls.add(call)
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self.calls or (task and task.cancelling()):
                raise  # it is the caller who has left
            raise _unavailable("given up") from None
        finally:
            self.calls.discard(call)
            call.cancel()

    async def adapter_call(self, method: str, request: Any, **options: Any) -> Any:
        """What a method of AdapterService answers. Raises AioRpcError, also when the replica leaves the fleet meanwhile."""
        call = self._adapter_call(method, request, options)
        with self.under_way(call):
            return await call

    async def adapter_stream(self, method: str, request: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """The messages of a method of AdapterService. Raises as `adapter_call` does."""
        call = self._adapter_call(method, request, options)
        with self.under_way(call):
            async for message in call:
                yield message

    def _adapter_call(self, method: str, request: Any, options: dict[str, Any]) -> Any:
        try:
            return getattr(self._adapters, method)(request, **options)
        except aio.UsageError as error:  # its channel is closed
            raise _unavailable("it has left the fleet") from error

    def succeeded(self) -> None:
        """A request was answered."""
        self._failures, self._pause_s = 0, _PAUSE_S

    def failed(self, asked_at: float = math.inf) -> None:
        """A request failed by the replica's fault: it gets none until a look finds it well; after three in a row, for a while.

        `asked_at` is when it was asked, by time.monotonic: all requests that one death or cut ends count once.
        """
        self.doubted = True
        if asked_at <= self._failed_at:
            return
        now = self._failed_at = time.monotonic()
        self._failures += 1
        if self._failures >= _FAILURES and now >= self._closed_until:
            self._closed_until = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def give_up(self) -> None:
        """End the calls that are under way: they are better off elsewhere."""
        calls, self.calls = self.calls, set()
        for call in calls:
            call.cancel()

    async def close(self, grace_s: float | None = None) -> None:
        """Close the connection, once what is under way has ended, or after `grace_s`."""
        await self.channel.close(grace_s)


def _unavailable(why: str) -> aio.AioRpcError:
    return aio.AioRpcError(StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), why)
