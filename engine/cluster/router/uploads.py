"""An upload on its way through: chunk by chunk to one replica, and its progress back.

Through grpc's threads, because grpc.aio loses the status of a server that refuses an upload before its end
(https://github.com/grpc/grpc/issues/36066).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import adapters_pb2_grpc
from engine.errors import LoraplexError


class Upload:
    """`async with` it, and iterate over the replica's responses.

    A refusal is an AioRpcError; what is wrong with a message of the caller's is the LoraplexError that reading it raised.
    """

    def __init__(self, channel: grpc.Channel, requests: AsyncIterator[Any], metadata: Any) -> None:
        self._channel = channel
        self._requests = requests
        self._metadata = metadata
        self._loop = asyncio.get_running_loop()
        self._responses: asyncio.Queue[Any] = asyncio.Queue()
        self._call: Any = None
        self._left = threading.Event()

    async def __aenter__(self) -> AsyncIterator[pb.PublishAdapterResponse]:
        stub = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._call = stub.PublishAdapter(self._chunks(), metadata=self._metadata)
        threading.Thread(target=self._read, daemon=True).start()
        return self._iterate()

    def cancel(self) -> None:
        """End it; who iterates gets CANCELLED."""
        self._call.cancel()

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        self._left.set()
        await asyncio.to_thread(self._channel.close)

    def _chunks(self) -> Iterator[Any]:
        """The caller's messages, in grpc's thread."""
        while not self._left.is_set():
            future = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
            try:
                message = future.result()
            except LoraplexError as error:  # in a message of the caller's
                self._tell(error)
                self._left.wait()  # or the replica would take what it has for all of it
                return
            if message is None:
                return
            yield message

    async def _next(self) -> Any:
        return await anext(self._requests, None)

    def _read(self) -> None:
        """The replica's messages, and at last its refusal or None."""
        try:
            for response in self._call:
                self._tell(response)
            self._tell(None)
        except grpc.RpcError as error:
            self._tell(error)

    def _tell(self, what: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._responses.put_nowait, what)

    async def _iterate(self) -> AsyncIterator[pb.PublishAdapterResponse]:
        while (response := await self._responses.get()) is not None:
            if isinstance(response, LoraplexError):
                raise response
            if isinstance(response, grpc.RpcError):
                error: Any = response
                trailers = aio.Metadata(*(tuple(pair) for pair in error.trailing_metadata() or ()))
                raise aio.AioRpcError(error.code(), aio.Metadata(), trailers, error.details())
            yield response
