"""Running a server: health, discovery, metrics, ports, models that cannot be served, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from engine.api.loraplex.v1 import adapters_pb2, engine_pb2, engine_pb2_grpc
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client import AsyncClient
from engine.client.testing import FakeServer, fake_server
from engine.errors import AddressInUse, BaseModelIncomplete, BaseModelNotFound
from engine.runtime.fake import FakeEngine
from engine.server.app import App
from engine.server.grpc_server import SERVICES
from engine.server.metrics import Labels
from tests.unit.runtime.conftest import CountingEngine
from tests.unit.server.conftest import (
    Stubs,
    all_of,
    ask,
    endless,
    engine_of,
    first_of,
    parts,
    refused,
    running,
    settings_in,
    stubs_to,
    until,
    upload,
)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
HEALTH_NAMES = ["", *(service.full_name for service in SERVICES)]


async def http(server: App, path: str) -> tuple[int, str]:
    """Ask the HTTP side port."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{server.settings.host}:{server.http_port}{path}") as answer:
            return answer.status, await answer.text()


@pytest.fixture
async def health(server: FakeServer) -> AsyncIterator[Any]:
    """The shared server's health service."""
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", HEALTH_NAMES)
async def test_health(health: Any, service: str) -> None:
    """Each service and the server as a whole are SERVING, by Check and by Watch."""
    request = health_pb2.HealthCheckRequest(service=service)
    assert (await health.Check(request)).status == SERVING
    watch = health.Watch(request)
    assert (await first_of(watch)).status == SERVING
    watch.cancel()


async def test_health_of_an_unknown_service(health: Any) -> None:
    """A service that does not exist has no health."""
    assert (await refused(health.Check(health_pb2.HealthCheckRequest(service="x")))).code is grpc.StatusCode.NOT_FOUND


async def test_health_follows_the_life_of_a_server(make_app: Callable[..., App]) -> None:
    """NOT_SERVING while the model loads, SERVING, and NOT_SERVING again while draining."""
    may_start = asyncio.Event()

    class Slow(FakeEngine):
        async def start(self) -> None:
            await may_start.wait()

    app = make_app(Slow())
    starting = asyncio.create_task(app.start())
    await until(lambda: app.port and app.http_port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        seen = [(await first_of(watch)).status]
        assert (await http(app, "/healthz"))[0] == 200
        assert (await http(app, "/readyz"))[0] == 503
        may_start.set()
        await starting
        seen.append((await first_of(watch)).status)
        assert (await http(app, "/readyz"))[0] == 200
        draining = asyncio.create_task(app.drain())
        seen.append((await first_of(watch)).status)
        await draining
        watch.cancel()
    await app.stop()
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]


async def test_not_ready_while_draining(make_app: Callable[..., App]) -> None:
    """A draining server tells its load balancer, so that nothing new is routed to it."""
    async with running(make_app()) as app:
        await app.drain()
        assert (await http(app, "/readyz"))[0] == 503
        assert (await http(app, "/healthz"))[0] == 200


async def test_changes_finish_before_the_server_stops(make_app: Callable[..., App], folder: Path) -> None:
    """A promotion and an upload under way are waited for, and new ones refused; who reads or watches is not in the way."""
    engine = CountingEngine()
    engine.may_load.clear()
    app = make_app(engine, drain_s=30)
    async with running(app), stubs_to(f"127.0.0.1:{app.port}") as stubs:
        header = adapters_pb2.PublishHeader(name="support")
        await asyncio.to_thread(upload, f"127.0.0.1:{app.port}", list(parts(folder, header)))
        move = adapters_pb2.SetAliasRequest(name="support", alias="canary", version="v1")
        watch = stubs.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        await first_of(watch)
        moving = asyncio.create_task(all_of(stubs.adapters.SetAlias(move)))
        publishing = stubs.adapters.PublishAdapter()
        messages = list(parts(folder, adapters_pb2.PublishHeader(name="other")))
        await publishing.write(messages[0])
        await until(lambda: engine.loads and app.boundary.acts.under_way == 2)
        draining = asyncio.create_task(app.drain())
        await until(lambda: app.admission.draining)
        refusal = await refused(all_of(stubs.adapters.SetAlias(move)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        await stubs.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        for message in messages[1:]:
            await publishing.write(message)
        await publishing.done_writing()
        assert [answer async for answer in publishing][-1].version.version == "v1"
        assert not draining.done()
        engine.may_load.set()
        assert (await moving)[-1].change.version == "v1"
        await draining
        watch.cancel()


async def test_health_of_a_dead_engine(make_app: Callable[..., App]) -> None:
    """An engine that died too often: NOT_SERVING, /healthz and /readyz 503, so that somebody restarts the server."""
    engine = FakeEngine()
    async with running(make_app(engine, max_restarts=0)) as app:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="loraplex.v1.GenerationService"))
            assert (await first_of(watch)).status == SERVING
            engine.alive = False
            assert (await asyncio.wait_for(first_of(watch), 3)).status == NOT_SERVING
            watch.cancel()
        assert (await http(app, "/healthz"))[0] == 503
        assert (await http(app, "/readyz"))[0] == 503
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            assert (await stub.GetEngine(engine_pb2.GetEngineRequest())).load.dead


async def test_health_of_an_engine_that_restarts(make_app: Callable[..., App]) -> None:
    """While a dead engine is replaced: NOT_SERVING and /readyz 503, but /healthz 200; then all is well, and counted."""
    may_start = asyncio.Event()
    may_start.set()

    class Slow(FakeEngine):
        async def start(self) -> None:
            await may_start.wait()
            await super().start()

    engine = Slow()
    async with running(make_app(engine)) as app:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await first_of(watch)).status == SERVING
            may_start.clear()
            engine.alive = False
            assert (await asyncio.wait_for(first_of(watch), 3)).status == NOT_SERVING
            assert [(await http(app, path))[0] for path in ("/healthz", "/readyz")] == [200, 503]
            told = await engine_pb2_grpc.EngineServiceStub(channel).GetEngine(engine_pb2.GetEngineRequest())
            assert (told.load.restarting, told.load.dead) == (True, False)
            assert "loraplex_engine_ready 0.0" in (await http(app, "/metrics"))[1]
            may_start.set()
            assert (await asyncio.wait_for(first_of(watch), 3)).status == SERVING
            watch.cancel()
        assert [(await http(app, path))[0] for path in ("/healthz", "/readyz")] == [200, 200]
        assert "loraplex_engine_restart_seconds_count 1.0" in (await http(app, "/metrics"))[1]


class Explorer:
    """A client that knows nothing but what server reflection tells it, as grpcurl does."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def services(self) -> set[str]:
        """Names of all services."""
        answer = await self._ask(list_services="")
        return {service.name for service in answer.list_services_response.service}

    async def call(self, service: str, method: str, **fields: Any) -> Any:
        """Call a unary method with a message made of `fields`."""
        await self._learn((await self._ask(file_containing_symbol=service)).file_descriptor_response)
        descriptor = self._pool.FindServiceByName(service).methods_by_name[method]
        request = message_factory.GetMessageClass(descriptor.input_type)(**fields)
        reply = message_factory.GetMessageClass(descriptor.output_type)
        stub = self.channel.unary_unary(
            f"/{service}/{method}", type(request).SerializeToString, lambda data: reply.FromString(data)
        )
        return await stub(request)

    async def _learn(self, answer: Any) -> None:
        for data in answer.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for needed in file.dependency:
                if needed not in self._known:
                    await self._learn((await self._ask(file_by_filename=needed)).file_descriptor_response)
            self._pool.Add(file)

    async def _ask(self, **question: str) -> Any:
        call = self._stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))
        (answer,) = await all_of(call)
        return answer


async def test_reflection(server: FakeServer) -> None:
    """Tools find all services, and can call Generate without our protos."""
    async with grpc.aio.insecure_channel(server.target) as channel:
        explorer = Explorer(channel)
        assert {service.full_name for service in SERVICES} <= await explorer.services()
        answer = await explorer.call(
            "loraplex.v1.GenerationService", "Generate", text="hi", sampling={"temperature": 0.0}
        )
        assert answer.completions[0].text == "base heard: hi"


def test_reflection_can_be_turned_off() -> None:
    """Without reflection nobody can list the services."""
    with fake_server(reflection=False) as server, grpc.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.ServerReflectionInfo(iter([question]), timeout=5))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_whom_a_server_without_a_policy_takes_one_for(stubs: Stubs) -> None:
    """Anybody, by the name that is given, who may do everything."""
    found = await stubs.engine.GetCaller(engine_pb2.GetCallerRequest())
    assert (found.identified, found.tenant) == (False, "anonymous")
    assert {"invoke", "promote", "admin"} <= set(found.roles)


async def test_engine_service(stubs: Stubs) -> None:
    """GetEngine tells base, limits, residents and load."""
    found = await stubs.engine.GetEngine(engine_pb2.GetEngineRequest())
    assert found.base.name == "fake-base"
    assert found.base.fingerprint.startswith("sha256:")
    assert found.base.dtype == "F32"
    assert found.compute_dtype == "float32"
    assert (found.limits.context_length, found.limits.vocabulary_size) == (2048, 257)
    assert found.limits.max_message_bytes == 8 * 1024 * 1024
    assert found.engine == "fake"
    assert found.server_version
    assert not found.load.draining


async def test_load_is_told() -> None:
    """GetEngine counts who runs and who waits."""
    with fake_server(max_running=1) as server:
        engine_of(server).token_interval_s = 0.02
        async with stubs_to(server.target) as stubs:
            streams = [stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless())) for _ in range(2)]
            reading = asyncio.gather(*(first_of(stream) for stream in streams), return_exceptions=True)
            await until(lambda: server.app.admission.waiting == 1)
            load = (await stubs.engine.GetEngine(engine_pb2.GetEngineRequest())).load
            assert (load.running, load.waiting) == (1, 1)
            assert load.kv_cache_usage > 0
            for stream in streams:
                stream.cancel()
            await reading


async def test_metrics() -> None:
    """The page parses, and counts calls by method and status, tokens and loads."""
    with fake_server() as server:
        await asyncio.to_thread(server.publish, "support")
        async with stubs_to(server.target) as stubs:
            answer = await stubs.generation.Generate(ask(adapter="support"), metadata=(("x-loraplex-tenant", "gold"),))
            await refused(stubs.generation.Generate(ask(adapter="nobody")))
        status, page = await http(server.app, "/metrics")
    assert status == 200
    found = {
        (sample.name, sample.labels.get("method", ""), sample.labels.get("code", "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert found["loraplex_calls_total", "Generate", "OK"] == 1
    assert found["loraplex_calls_total", "Generate", "NOT_FOUND"] == 1
    assert found["loraplex_calls_total", "PublishAdapter", "OK"] == 1
    assert found["loraplex_generated_tokens_total", "", ""] == answer.usage.completion_tokens
    assert found["loraplex_adapter_load_seconds_count", "", ""] == 1
    assert found["loraplex_ttft_seconds_count", "", ""] == 1
    assert b'loraplex_queue_seconds_count{outcome="admitted"} 1.0' in page.encode()
    assert b'loraplex_tenant_tokens_total{kind="prompt",tenant="gold"} 2.0' in page.encode()
    assert found["loraplex_running_adapters", "", ""] == 0
    assert found["loraplex_running", "", ""] == 0
    assert found["loraplex_resident_adapters", "", ""] == 1


def test_labels_are_bounded() -> None:
    """However many names callers invent, few get a label; one with its part of everything gets one, and keeps it."""
    labels = Labels(most=3)
    assert labels.label("first", 100) == "first"
    assert {labels.label(f"name-{number}", 1) for number in range(1000)} == {"other"}
    assert labels.label("large", 1000) == "large"
    assert labels.label("first", 0) == "first"
    assert len(labels._amounts) <= 31
    for number in range(10):
        labels.label(f"large-{number}", 10**6)
    assert len(labels._labels) == 3


@pytest.mark.parametrize("which", ["port", "http_port"])
async def test_port_taken(make_app: Callable[..., App], which: str) -> None:
    """A port that somebody else has is an error that names it, before any engine starts."""

    class Never(FakeEngine):
        async def start(self) -> None:
            raise AssertionError("the engine must not start")

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        app = make_app(Never(), **{which: taken})
        try:
            with pytest.raises(AddressInUse, match=str(taken)):
                await app.start()
        finally:
            await app.stop()


async def test_second_server_on_the_same_port(server: FakeServer, make_app: Callable[..., App]) -> None:
    """A second server does not take half of the first one's connections."""
    app = make_app(port=server.app.port)
    try:
        with pytest.raises(AddressInUse):
            await app.start()
    finally:
        await app.stop()


def _no_folder(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()
    base.rmdir()


def _no_config(base: Path) -> None:
    (base / "config.json").unlink()


def _no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def _no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def _missing_shard(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _cut_off(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _broken_config(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("spoil", "error", "named"),
    [
        (_no_folder, BaseModelNotFound, "fake-base"),
        (_no_config, BaseModelIncomplete, "config.json"),
        (_no_tokenizer, BaseModelIncomplete, "tokenizer"),
        (_no_weights, BaseModelIncomplete, "safetensors"),
        (_missing_shard, BaseModelIncomplete, "model-00002-of-00002.safetensors"),
        (_cut_off, BaseModelIncomplete, "model.safetensors is damaged"),
        (_broken_config, BaseModelIncomplete, "config.json"),
    ],
)
async def test_model_that_cannot_be_served(tmp_path: Path, spoil: Any, error: type[Exception], named: str) -> None:
    """A missing or half-downloaded model is told by file, before any engine starts or port opens."""

    class Never(FakeEngine):
        async def start(self) -> None:
            raise AssertionError("the engine must not start")

    settings = settings_in(tmp_path)
    spoil(settings.model)
    app = App(settings, Never())
    with pytest.raises(error, match=named):
        await app.start()
    assert app.port == 0
    await app.stop()


async def test_stop_twice(make_app: Callable[..., App]) -> None:
    """Stopping again is harmless, and so is stopping what never started."""
    app = make_app()
    await app.stop()
    app = make_app()
    await app.start()
    await app.stop()
    await app.stop()


@pytest.mark.slow
async def test_sigterm(tmp_path: Path) -> None:
    """SIGTERM: the stream in flight finishes, new calls are refused, and the process ends with 0."""
    settings = settings_in(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "engine": "fake", "model": settings.model, "registry": settings.registry, "cache": settings.cache,
        "port": port, "http-port": 0, "drain-s": 10, "log-format": "json",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    code = (
        "import sys; from engine.runtime import fake; "
        "init = fake.FakeEngine.__init__; "
        "fake.FakeEngine.__init__ = lambda self, **given: init(self, **given, token_interval_s=0.05); "
        "from engine.cli import main; sys.exit(main())"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "serve", *words,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    try:
        async with AsyncClient(f"127.0.0.1:{port}", retries=0) as client:
            await client.wait_ready(20)
            chunks = client.stream(prompt="hi", temperature=0)
            texts = [(await anext(chunks)).text]
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            async with AsyncClient(f"127.0.0.1:{port}", retries=0, timeout_s=5) as late:
                with pytest.raises(Exception, match="shutting down") as refusal:
                    await late.generate(prompt="hi")
            assert refusal.value.code is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            texts += [chunk.text async for chunk in chunks]
            assert "".join(texts) == "base heard: hi"
        _, log = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0
        events = [json.loads(line)["event"] for line in log.decode().splitlines()]
        assert events[0] == "ready"
        assert events[-1] == "stopped"
        assert "Traceback" not in log.decode()
        assert '"hi"' not in log.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
