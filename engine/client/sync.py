"""The client for threads: an AsyncClient on an event loop of its own, in one background thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

import grpc

from engine.api.loraplex.v1 import adapters_pb2
from engine.client.adapters import Adapters
from engine.client.aio import AsyncClient
from engine.client.channel import MEBIBYTE
from engine.client.errors import RequestError
from engine.client.requests import GenerateOptions
from engine.client.results import Chunk
from engine.client.tracing import Metadata

A = TypeVar("A")
T = TypeVar("T")
P = ParamSpec("P")


class _LoopThread:
    """A thread that runs an event loop; any other thread may run coroutines on it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: the garbage collector may close a stream at any allocation
        self._closed = False
        self._stop = asyncio.Event()
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(started)), name="loraplex-client", daemon=True
        )
        self._thread.start()
        self._loop = started.result()

    async def _main(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stop.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait until `work` is done on the loop."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a Client cannot be called from its own callbacks")
        future = self._submit(work)
        if future is None:
            raise RuntimeError("the client is closed")
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RequestError("the client was closed during the call", grpc.StatusCode.CANCELLED) from None
        except BaseException:  # KeyboardInterrupt above all: the call must not go on without its caller
            future.cancel()
            raise

    def drain(self, stream: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """What an asynchronous generator yields; closing this one closes that one, without waiting for it."""
        try:
            while True:
                try:
                    item = self.run(stream.__anext__())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._submit(stream.aclose())

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `last`, stop the loop and join the thread. Closing twice is harmless."""

        async def finish() -> None:
            try:
                await last()
            finally:
                self._stop.set()

        with self._lock:
            future = None if self._closed else self._submit(finish())
            self._closed = True
        if future is not None:
            future.result()
        self._thread.join()

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T] | None:
        with self._lock:
            if self._closed:
                work.close()
                return None
            return asyncio.run_coroutine_threadsafe(work, self._loop)


class _Facade(Generic[A]):
    """An asynchronous object, and the thread on whose loop it lives."""

    def __init__(self, loop: _LoopThread, inner: A) -> None:
        self._loop = loop
        self._inner = inner


def _blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[_Facade[A], P], T]:
    """The same method, waiting for its result."""

    @functools.wraps(method)
    def call(self: _Facade[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(method(self._inner, *args, **kwargs))

    return call


class SyncAdapters(_Facade[Adapters]):
    """`Adapters`, for threads: the same methods, arguments and results. `on_progress` is called on another thread."""

    list = _blocking(Adapters.list)
    get = _blocking(Adapters.get)
    publish = _blocking(Adapters.publish)
    promote = _blocking(Adapters.promote)
    rollback = _blocking(Adapters.rollback)
    set_canary = _blocking(Adapters.set_canary)
    end_canary = _blocking(Adapters.end_canary)
    canary_report = _blocking(Adapters.canary_report)
    set_shadow = _blocking(Adapters.set_shadow)
    end_shadow = _blocking(Adapters.end_shadow)
    shadow_report = _blocking(Adapters.shadow_report)
    remove_alias = _blocking(Adapters.remove_alias)
    preload = _blocking(Adapters.preload)
    pin = _blocking(Adapters.pin)
    unload = _blocking(Adapters.unload)
    delete_version = _blocking(Adapters.delete_version)
    record_evaluation = _blocking(Adapters.record_evaluation)
    evaluations = _blocking(Adapters.evaluations)

    def watch(
        self, name: str = "", *, include_engine: bool = False, timeout_s: float = float("inf")
    ) -> Generator[adapters_pb2.WatchAdaptersResponse, None, None]:
        """Changes from now on, of one adapter or of all. The first message has no change: the watch has begun."""
        return self._loop.drain(self._inner.watch(name, include_engine=include_engine, timeout_s=timeout_s))


class Client(_Facade[AsyncClient]):
    """AsyncClient for threads: the same arguments, methods and errors. Any number of threads may use one.

    It has a thread and an event loop of its own until it is closed. Not to be used across a fork.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
        metadata: Metadata = (),
        max_message_bytes: int = 64 * MEBIBYTE,
        retries: int = 4,
    ) -> None:
        async def connect() -> AsyncClient:
            return AsyncClient(
                target,
                timeout_s=timeout_s,
                credentials=credentials,
                api_key=api_key,
                metadata=metadata,
                max_message_bytes=max_message_bytes,
                retries=retries,
            )

        loop = _LoopThread()
        super().__init__(loop, loop.run(connect()))
        self.target = target
        self.adapters = SyncAdapters(loop, self._inner.adapters)
        """Publishes adapters and decides which version answers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and join the thread; calls in flight fail as CANCELLED."""
        self._loop.close(self._inner.close)

    generate = _blocking(AsyncClient.generate)
    count_tokens = _blocking(AsyncClient.count_tokens)
    engine = _blocking(AsyncClient.engine)
    activity = _blocking(AsyncClient.activity)
    caller = _blocking(AsyncClient.caller)
    wait_ready = _blocking(AsyncClient.wait_ready)

    def stream(self, **options: Unpack[GenerateOptions]) -> Generator[Chunk, None, None]:
        """Answer a prompt token by token, with the same keywords as `generate`.

        Raises StreamBroken if messages are missing, the last one included. Leaving the loop cancels the request.
        """
        return self._loop.drain(self._inner.stream(**options))
