"""Servers on real sockets with made-up answers, and raw gRPC calls to them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import adapters_pb2_grpc, engine_pb2_grpc, generation_pb2, generation_pb2_grpc
from engine.client import AsyncClient
from engine.client.testing import FakeServer, fake_server, write_adapter, write_base
from engine.config import Settings
from engine.runtime.engine import Engine
from engine.runtime.fake import FakeEngine
from engine.server.app import App

_names = itertools.count(1)


@dataclass
class Refusal:
    """What a caller sees of a refused call."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    resource: error_details_pb2.ResourceInfo | None = None
    retry_s: float | None = None
    pushback_ms: int | None = None
    quota: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: grpc.RpcError) -> Refusal:
        """Read status and trailers."""
        refusal = cls(error.code(), error.details() or "")
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-retry-pushback-ms":
                refusal.pushback_ms = int(value)
            elif key == "grpc-status-details-bin":
                status = status_pb2.Status.FromString(value)
                assert status.code == refusal.code.value[0]
                for detail in status.details:
                    refusal._add(detail)
        return refusal

    def _add(self, detail: Any) -> None:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        resource, retry = error_details_pb2.ResourceInfo(), error_details_pb2.RetryInfo()
        quota = error_details_pb2.QuotaFailure()
        if detail.Unpack(info):
            assert info.domain == "loraplex"
            self.reason, self.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            self.violations = {one.field: one.description for one in bad.field_violations}
        elif detail.Unpack(resource):
            self.resource = resource
        elif detail.Unpack(quota):
            self.quota = {one.subject: one.description for one in quota.violations}
        elif detail.Unpack(retry):
            self.retry_s = retry.retry_delay.ToTimedelta().total_seconds()


async def refused(call: Awaitable[Any]) -> Refusal:
    """Await a call that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return Refusal.of(caught.value)


async def all_of(call: Any) -> list[Any]:
    """Every message of a stream."""
    return [message async for message in call]


async def first_of(call: Any) -> Any:
    """The next message of a stream; the others may still be read."""
    return await anext(aiter(call))


class Stubs:
    """The three services over one channel, without any client code of ours."""

    def __init__(self, channel: aio.Channel) -> None:
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.engine = engine_pb2_grpc.EngineServiceStub(channel)


@asynccontextmanager
async def stubs_to(target: str) -> AsyncIterator[Stubs]:
    """Stubs for a server, whose calls are never repeated by gRPC itself."""
    async with aio.insecure_channel(target, options=[("grpc.enable_retries", 0)]) as channel:
        yield Stubs(channel)


def ask(text: str = "hi", adapter: str = "", **sampling: Any) -> generation_pb2.GenerateRequest:
    """A greedy request."""
    return generation_pb2.GenerateRequest(
        text=text, adapter=adapter, sampling=generation_pb2.SamplingParams(**({"temperature": 0.0} | sampling))
    )


def ask_stream(*args: Any, **sampling: Any) -> generation_pb2.GenerateStreamRequest:
    """The same for GenerateStream."""
    return generation_pb2.GenerateStreamRequest(request=ask(*args, **sampling))


def endless(text: str = "on", **sampling: Any) -> generation_pb2.GenerateRequest:
    """A request that takes long: 1,000 tokens."""
    return ask(text, max_tokens=1000, ignore_eos=True, **sampling)


def parts(folder: Path, header: pb.PublishHeader) -> Iterator[pb.PublishAdapterRequest]:
    """The messages of an upload."""
    yield pb.PublishAdapterRequest(header=header)
    for path in sorted(folder.iterdir()):
        yield chunk(path.name, path.read_bytes())


def chunk(path: str, data: bytes) -> pb.PublishAdapterRequest:
    """A piece of a file."""
    return pb.PublishAdapterRequest(chunk=pb.FileChunk(path=path, data=data))


def upload(target: str, messages: Iterable[pb.PublishAdapterRequest]) -> list[pb.PublishAdapterResponse]:
    """Publish through plain synchronous gRPC; blocks, and raises grpc.RpcError."""
    with grpc.insecure_channel(target) as channel:
        return list(adapters_pb2_grpc.AdapterServiceStub(channel).PublishAdapter(iter(messages), timeout=20))


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def engine_of(server: FakeServer) -> FakeEngine:
    """The server's fake engine."""
    engine = server.app.engine
    assert isinstance(engine, FakeEngine)
    return engine


def settings_in(folder: Path, **changes: Any) -> Settings:
    """Settings of a fake server in `folder`."""
    base = folder / "fake-base"
    if not base.exists():
        write_base(base)
    given: dict[str, Any] = {
        "engine": "fake",
        "model": base,
        "registry": str(folder / "registry"),
        "cache": folder / "cache",
        "port": 0,
        "http_port": 0,
        "drain_s": 1,
    }
    return Settings(**(given | changes))


@asynccontextmanager
async def running(app: App) -> AsyncIterator[App]:
    """An App on the test's own event loop."""
    try:
        await app.start()
        yield app
    finally:
        await app.stop()


@pytest.fixture
def make_app(tmp_path: Path) -> Callable[..., App]:
    """Makes an App that has not started; `engine` takes another engine's place."""

    def make(engine: Engine | None = None, **settings: Any) -> App:
        return App(settings_in(tmp_path, **settings), engine)

    return make


@pytest.fixture(scope="session")
def server() -> Iterator[FakeServer]:
    """One server for all tests that change nothing of it: each uses adapter names of its own."""
    with fake_server(refresh_s=0.1, max_resident=64, max_running=64) as fake:
        yield fake


@pytest.fixture
async def stubs(server: FakeServer) -> AsyncIterator[Stubs]:
    """Calls to the shared server."""
    async with stubs_to(server.target) as found:
        yield found


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    """Our own client, connected to the shared server."""
    async with AsyncClient(server.target, timeout_s=20) as found:
        yield found


@pytest.fixture
def name() -> str:
    """An adapter name that no other test uses."""
    return f"adapter-{next(_names)}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid adapter's folder."""
    write_adapter(tmp_path / "adapter", seed=next(_names) + 1000)
    return tmp_path / "adapter"
