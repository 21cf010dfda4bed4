"""Every row of the status table: which code, which details, and that nothing else leaves the server."""

from __future__ import annotations

import asyncio
import math
import string
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.api.loraplex.v1 import adapters_pb2 as apb
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.api.validate import validate_pb2
from engine.client.testing import FakeServer, fake_server
from engine.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, LoraplexError, QuotaExceeded
from engine.runtime.fake import FakeEngine
from engine.runtime.generator import Generator
from engine.server.app import App
from engine.server.grpc_server import SERVICES
from engine.server.status import message_of, trailers_of
from engine.server.validation import check
from tests.unit.server.conftest import (
    Refusal,
    Stubs,
    all_of,
    ask,
    ask_stream,
    endless,
    engine_of,
    first_of,
    refused,
    running,
    stubs_to,
    until,
    upload,
)

Code = grpc.StatusCode
METHODS = {method.name: method for service in SERVICES for method in service.methods}


async def test_unknown_adapter(stubs: Stubs, server: FakeServer) -> None:
    """An unknown name: NOT_FOUND, with the nearest names."""
    server.publish("invoices")
    refusal = await refused(stubs.generation.Generate(ask(adapter="invoises")))
    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert "invoices" in refusal.message
    assert refusal.resource is not None
    assert (refusal.resource.resource_type, refusal.resource.resource_name) == ("adapter", "invoises")
    assert refusal.resource.description == "invoices"


@pytest.mark.parametrize(("ref", "kind"), [("invoices-b@v7", "version"), ("invoices-b@canary", "alias")])
async def test_unknown_version_or_alias(stubs: Stubs, server: FakeServer, ref: str, kind: str) -> None:
    """An unknown version or alias of a known adapter says which of the two it is."""
    server.publish("invoices-b")
    refusal = await refused(stubs.generation.Generate(ask(adapter=ref)))
    assert refusal.code is Code.NOT_FOUND
    assert refusal.resource is not None
    assert (refusal.resource.resource_type, refusal.resource.resource_name) == (kind, ref)


async def test_unknown_everywhere(stubs: Stubs) -> None:
    """Every call that names an adapter says NOT_FOUND when there is none."""
    calls = [
        all_of(stubs.generation.GenerateStream(ask_stream(adapter="nobody-knows"))),
        stubs.adapters.GetAdapter(apb.GetAdapterRequest(name="nobody-knows")),
        all_of(stubs.adapters.SetAlias(apb.SetAliasRequest(name="nobody-knows", alias="current", version="v1"))),
        all_of(stubs.adapters.RollbackAlias(apb.RollbackAliasRequest(name="nobody-knows"))),
        stubs.adapters.RemoveAlias(apb.RemoveAliasRequest(name="nobody-knows", alias="canary")),
        all_of(stubs.adapters.PreloadAdapter(apb.PreloadAdapterRequest(adapter="nobody-knows"))),
        stubs.adapters.PinAdapter(apb.PinAdapterRequest(adapter="nobody-knows", pinned=True)),
        stubs.adapters.UnloadAdapter(apb.UnloadAdapterRequest(adapter="nobody-knows")),
        stubs.adapters.DeleteVersion(apb.DeleteVersionRequest(name="nobody-knows", version="v1")),
    ]
    assert {(await refused(call)).code for call in calls} == {Code.NOT_FOUND}


BAD_NAMES = ["Support", "a b", "../etc", "a/b", "-a", "a@", "@v1", "a@b@c", "a" * 64, "ä", "a\n", "a\x00"]


@pytest.mark.parametrize("bad", BAD_NAMES)
async def test_bad_reference(stubs: Stubs, bad: str) -> None:
    """What can be no adapter is INVALID_ARGUMENT, naming the field and the rule."""
    refusal = await refused(stubs.generation.Generate(ask(adapter=bad)))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert "NAME@VERSION" in refusal.violations["adapter"]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("GetAdapter", apb.GetAdapterRequest(name="No"), "name"),
        ("GetAdapter", apb.GetAdapterRequest(), "name"),
        ("SetAlias", apb.SetAliasRequest(name="a", alias="v2", version="x"), "version"),
        ("SetAlias", apb.SetAliasRequest(name="a", alias="base", version="v1"), "alias"),
        ("SetAlias", apb.SetAliasRequest(name="a", alias="b", version="v0"), "version"),
        ("SetAlias", apb.SetAliasRequest(name="a", alias="b", version="v1", expected_version="1"), "expected_version"),
        ("SetAlias", apb.SetAliasRequest(name="a", alias="b", version="v1", reason="x" * 1025), "reason"),
        ("RollbackAlias", apb.RollbackAliasRequest(name="a", alias="A"), "alias"),
        ("RollbackAlias", apb.RollbackAliasRequest(name="a", actor="x" * 257), "actor"),
        ("RemoveAlias", apb.RemoveAliasRequest(name="a", alias="current"), "alias"),
        ("PreloadAdapter", apb.PreloadAdapterRequest(adapter="a@@"), "adapter"),
        ("PinAdapter", apb.PinAdapterRequest(adapter=""), "adapter"),
        ("UnloadAdapter", apb.UnloadAdapterRequest(adapter="a/b"), "adapter"),
        ("DeleteVersion", apb.DeleteVersionRequest(name="a", version="latest"), "version"),
        ("WatchAdapters", apb.WatchAdaptersRequest(name="*"), "name"),
    ],
)
async def test_bad_administration(stubs: Stubs, method: str, request_: Any, field: str) -> None:
    """The administration's fields are checked like any other."""
    call = getattr(stubs.adapters, method)(request_)
    refusal = await refused(all_of(call) if METHODS[method].server_streaming else call)
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert field in refusal.violations


async def test_alias_that_looks_like_a_version(stubs: Stubs, server: FakeServer, name: str) -> None:
    """`v2` as an alias would hide the version of that name."""
    server.publish(name)
    refusal = await refused(all_of(stubs.adapters.SetAlias(apb.SetAliasRequest(name=name, alias="v2", version="v1"))))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert "alias" in refusal.violations


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, -1])), "token_ids.ids[1]"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 999])), "token_ids.ids"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])), "chat.messages[0].role"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=9, content="x")])), "chat.messages[0].role"),  # type: ignore[arg-type]
        (ask("x" * 2048), "prompt"),
        (ask("x" * 2000, max_tokens=49), "sampling.max_tokens"),
        (ask(min_tokens=9, max_tokens=8), "sampling.min_tokens"),
        (ask(min_tokens=129), "sampling.min_tokens"),
        (ask(n=2), "sampling.n"),
        (ask(stop=[""]), "sampling.stop[0]"),
        (ask(stop=["a", "b", "c", "d", "e"]), "sampling.stop"),
        (ask(stop=["x" * 257]), "sampling.stop[0]"),
        (ask(stop_token_ids=[-1]), "sampling.stop_token_ids[0]"),
        (ask(stop_token_ids=[257]), "sampling.stop_token_ids"),
        (ask(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
        (ask(logit_bias={300: 1.0}), "sampling.logit_bias"),
        (ask(logit_bias={3: 101.0}), "sampling.logit_bias[3]"),
        (ask(logit_bias={3: math.nan}), "sampling.logit_bias[3]"),
        (ask(logit_bias={-3: 1.0}), "sampling.logit_bias[-3]"),
        (ask(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias"),
        (ask(structured=pb.StructuredOutput()), "sampling.structured.constraint"),
        (ask(structured=pb.StructuredOutput(json_schema="{")), "sampling.structured.json_schema"),
        (ask(structured=pb.StructuredOutput(json_schema="x" * 65537)), "sampling.structured.json_schema"),
        (ask(structured=pb.StructuredOutput(regex="[")), "sampling.structured.regex"),
        (ask(structured=pb.StructuredOutput(grammar="%%%")), "sampling.structured.grammar"),
        (ask(structured=pb.StructuredOutput(choice=pb.Choice())), "sampling.structured.choice.options"),
        (ask(structured=pb.StructuredOutput(choice=pb.Choice(options=["a", "a"]))), "sampling.structured.choice.options"),
        (pb.GenerateRequest(text="x", request_id="white space"), "request_id"),
        (pb.GenerateRequest(text="x", request_id="x" * 129), "request_id"),
        (pb.GenerateRequest(text="x", labels={"": "x"}), "labels[]"),
        (pb.GenerateRequest(text="x", labels={"k": "x" * 257}), "labels[k]"),
        (pb.GenerateRequest(text="x", labels={str(i): "" for i in range(17)}), "labels"),
        (pb.GenerateRequest(text="x", priority=101), "priority"),
        (pb.GenerateRequest(text="x", priority=-101), "priority"),
    ],
)  # fmt: skip
async def test_bad_request(stubs: Stubs, request_: pb.GenerateRequest, field: str) -> None:
    """Each wrong field is INVALID_ARGUMENT and named, by Generate and by GenerateStream alike."""
    refusal = await refused(stubs.generation.Generate(request_))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert field in refusal.violations, refusal.violations
    streamed = await refused(all_of(stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request_))))
    assert streamed.code is Code.INVALID_ARGUMENT
    assert any(found in (field, f"request.{field}") for found in streamed.violations), streamed.violations


def out_of_range() -> Iterator[tuple[str, float]]:
    """For every number in SamplingParams: a little below, a little above, and what is no number at all."""
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if field.is_repeated or field.message_type or field.type == FieldDescriptor.TYPE_BOOL:
            continue
        rules = field.GetOptions().Extensions[validate_pb2.field]
        kind = rules.WhichOneof("type")
        limits = getattr(rules, kind)
        step = 0.001 if kind == "float" else 1
        if limits.HasField("gte"):
            yield field.name, limits.gte - step
        if kind == "float" and limits.HasField("gt"):
            yield field.name, limits.gt
        if limits.HasField("lte"):
            yield field.name, limits.lte + step
        if kind == "float":
            yield from ((field.name, value) for value in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize(("field", "value"), list(out_of_range()))
async def test_out_of_range(stubs: Stubs, field: str, value: float) -> None:
    """Just outside each limit of the protos, and at NaN and infinity, the field is refused."""
    refusal = await refused(stubs.generation.Generate(ask(**{field: value})))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert f"sampling.{field}" in refusal.violations


async def test_every_violation_at_once(stubs: Stubs) -> None:
    """All that is wrong comes in one answer."""
    refusal = await refused(stubs.generation.Generate(ask(adapter="A", temperature=9, top_p=0)))
    assert set(refusal.violations) == {"adapter", "sampling.temperature", "sampling.top_p"}


async def test_count_tokens_refuses_too(stubs: Stubs) -> None:
    """CountTokens checks its prompt like Generate."""
    refusal = await refused(stubs.generation.CountTokens(pb.CountTokensRequest()))
    assert "prompt" in refusal.violations


async def test_long_errors_are_cut(stubs: Stubs) -> None:
    """Any number of violations fits the trailers."""
    ids = pb.TokenIds(ids=[-1] * 5000)
    refusal = await refused(stubs.generation.Generate(pb.GenerateRequest(token_ids=ids)))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert 1 <= len(refusal.violations) <= 20
    assert len(refusal.message) <= 2000


@pytest.mark.parametrize("labels", [{"k" * 2000: ""}, {"k" * 100_000: ""}, {"日" * 1500: ""}, {"%" * 2000: ""}])
async def test_long_keys_are_cut(stubs: Stubs, labels: dict[str, str]) -> None:
    """A key of any length and alphabet leaves our own error, by its name."""
    refusal = await refused(stubs.generation.Generate(pb.GenerateRequest(text="x", labels=labels)))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert list(refusal.violations) == [f"labels[{next(iter(labels))[:40]}…]"]


@pytest.mark.parametrize("letter", ["x", "é", "日", "🙂", "%"])
@pytest.mark.parametrize(
    "make",
    [
        lambda text: InvalidRequest(text, text, *[(text, text)] * 50),
        lambda text: InvalidAdapter("config", text, text, fix=text),
        lambda text: QuotaExceeded("acme", text, 1.0),
        lambda text: AdapterNotFound(text, [text] * 3),
    ],
)
def test_trailers_are_small(make: Callable[[str], LoraplexError], letter: str) -> None:
    """Message and details fit 8 KiB as gRPC encodes them, whatever is in the error, and the reason is always among them."""
    error = make(letter * 3000)
    found = message_of(error)
    details = dict(trailers_of(error, "r"))["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    assert len(quote(found, safe=string.printable.replace("%", ""))) + len(b64encode(details)) < 7000
    assert found
    status = status_pb2.Status.FromString(details)
    assert status.details[0].Unpack(error_details_pb2.ErrorInfo())
    bad = error_details_pb2.BadRequest()
    if isinstance(error, InvalidRequest | InvalidAdapter):
        assert status.details[1].Unpack(bad)
        assert bad.field_violations[0].field


@pytest.mark.parametrize(
    ("request_", "violations"),
    [
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 5000)), 1),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1] * 5000)), 1),
        (pb.GenerateRequest(text="x", labels={str(number): "x" * 300 for number in range(2000)}), 1),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 100)), 21),
        (ask("x" * 100_000, temperature=9, top_p=0), 2),
    ],
)
def test_violations_are_few(request_: pb.GenerateRequest, violations: int) -> None:
    """Of long lists only the first violation is looked for, and of many only so many are named."""
    with pytest.raises(InvalidRequest) as caught:
        check(request_)
    assert len(caught.value.violations) == violations
    if violations > 20:
        assert caught.value.violations[-1] == ("", "and 80 more")


@pytest.fixture(scope="module")
def raw(server: FakeServer) -> Iterator[grpc.Channel]:
    """A synchronous channel for bytes."""
    with grpc.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
        yield channel


@given(method=st.sampled_from(sorted(METHODS)), data=st.binary(max_size=200))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_malformed_bytes(raw: grpc.Channel, method: str, data: bytes) -> None:
    """Bytes that are no message of ours are the caller's mistake; never UNKNOWN, never INTERNAL."""
    descriptor = METHODS[method]
    call = raw.stream_stream(f"/{descriptor.containing_service.full_name}/{method}")(iter([data]), timeout=10)
    try:
        next(call, None)
        code = Code.OK
    except grpc.RpcError as error:
        refusal = Refusal.of(error)
        code = refusal.code
        assert refusal.metadata["request_id"]
    finally:
        call.cancel()
    assert code in (Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND)
    if _is_malformed(method, data):
        assert code is Code.INVALID_ARGUMENT


def _is_malformed(method: str, data: bytes) -> bool:
    message = METHODS[method].input_type._concrete_class()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return True
    return False


def test_unknown_method(raw: grpc.Channel) -> None:
    """A method that does not exist is UNIMPLEMENTED."""
    with pytest.raises(grpc.RpcError) as caught:
        raw.unary_unary("/loraplex.v1.GenerationService/Guess")(b"", timeout=5)
    assert caught.value.code() is Code.UNIMPLEMENTED


@pytest.mark.parametrize("streaming", [False, True])
async def test_bug(stubs: Stubs, server: FakeServer, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """A bug of ours is INTERNAL with the request id, and not a word of the exception."""

    def broken(*_: Any) -> Any:
        raise ValueError("secret at /home/operator/keys")

    monkeypatch.setattr(Generator, "answer", broken)
    metadata = (("x-request-id", "find-me"),)
    if streaming:
        refusal = await refused(all_of(stubs.generation.GenerateStream(ask_stream(), metadata=metadata)))
    else:
        refusal = await refused(stubs.generation.Generate(ask(), metadata=metadata))
    assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
    assert refusal.message == "internal error (request find-me)"
    assert refusal.metadata["request_id"] == "find-me"
    assert "secret" not in str(refusal.__dict__)


async def test_overload() -> None:
    """Past places and queue: UNAVAILABLE at once, saying when to come back; who waits is answered."""
    with fake_server(max_running=1, max_waiting=1) as server:
        engine_of(server).token_interval_s = 0.02
        async with stubs_to(server.target) as stubs:
            first, second = (asyncio.create_task(all_of(stubs.generation.GenerateStream(ask_stream()))) for _ in "12")
            await until(lambda: server.app.admission.waiting == 1)
            refusal = await refused(stubs.generation.Generate(ask(), timeout=5))
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "OVERLOADED")
            assert refusal.retry_s == 1.0
            assert refusal.pushback_ms == 1000
            for stream in (first, second):
                assert "".join(message.text for message in await stream) == "base heard: hi"


@asynccontextmanager
async def busy(stubs: Stubs, tenant: str, count: int) -> AsyncIterator[None]:
    """So many endless streams of a tenant, which end with the block."""
    request = pb.GenerateStreamRequest(request=endless())
    streams = [stubs.generation.GenerateStream(request, metadata=of(tenant)) for _ in range(count)]
    reading = asyncio.gather(*(first_of(stream) for stream in streams), return_exceptions=True)
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()
        await reading


def of(tenant: str) -> tuple[tuple[str, str], ...]:
    """The metadata that names a tenant."""
    return (("x-loraplex-tenant", tenant),)


async def test_a_tenants_quota() -> None:
    """Past its own limit a tenant is told that it is its own, and when to come back; others still queue."""
    with fake_server(max_running=1, max_waiting_per_tenant=1) as server:
        engine_of(server).token_interval_s = 0.005
        async with stubs_to(server.target) as stubs:
            async with busy(stubs, "loud", 2):
                await until(lambda: server.app.admission.waiting == 1)
                refusal = await refused(stubs.generation.Generate(ask(), timeout=5, metadata=of("loud")))
                assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
                assert refusal.retry_s == 1.0
                assert refusal.pushback_ms is None, "gRPC must not retry this by itself"
                assert list(refusal.quota) == ["loud"]
                quiet = asyncio.ensure_future(stubs.generation.Generate(ask(), metadata=of("quiet")))
                await until(lambda: server.app.admission.waiting == 2)
            assert (await quiet).completions[0].text == "base heard: hi"


async def test_waiting_too_long() -> None:
    """No place within the limit: UNAVAILABLE, as it is our capacity."""
    with fake_server(max_running=1, max_wait_s=0.1) as server:
        engine_of(server).token_interval_s = 0.005
        async with stubs_to(server.target) as stubs, busy(stubs, "a", 1):
            await until(lambda: server.app.admission.running == 1)
            refusal = await refused(stubs.generation.Generate(ask(), timeout=5))
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "WAITED_TOO_LONG")
            assert refusal.retry_s is not None
            assert refusal.pushback_ms is not None


async def test_a_deadline_that_cannot_be_met() -> None:
    """Who would be answered too late is told at once, while who has the time waits."""
    with fake_server(max_running=1) as server:
        engine_of(server).token_interval_s = 0.01
        async with stubs_to(server.target) as stubs:
            for _ in range(8):
                await stubs.generation.Generate(ask(max_tokens=10))
            async with busy(stubs, "a", 4):
                await until(lambda: server.app.admission.waiting == 3)
                started = time.monotonic()
                refusal = await refused(stubs.generation.Generate(ask(max_tokens=10), timeout=0.2))
                assert time.monotonic() - started < 0.15
                assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DEADLINE_UNREACHABLE")
                assert refusal.retry_s is not None
                patient = asyncio.ensure_future(stubs.generation.Generate(ask(max_tokens=10), timeout=20))
                await until(lambda: server.app.admission.waiting == 4)
            assert (await patient).completions[0].text


@pytest.mark.parametrize("name", ["", " ", "-x", "a b", "x" * 65, "../x"])
async def test_malformed_tenant(stubs: Stubs, name: str) -> None:
    """A tenant's name that could not be one is a bad field, not another tenant."""
    refusal = await refused(stubs.generation.Generate(ask(), metadata=of(name)))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert list(refusal.violations) == ["x-loraplex-tenant"]


async def test_too_many_calls() -> None:
    """Calls of any kind are bounded, watchers included."""
    with fake_server(max_streams=2) as server:
        async with stubs_to(server.target) as stubs:
            watches = [stubs.adapters.WatchAdapters(apb.WatchAdaptersRequest()) for _ in range(2)]
            for watch in watches:
                await first_of(watch)
            refusal = await refused(stubs.generation.CountTokens(pb.CountTokensRequest(text="x")))
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "OVERLOADED")
            watches[0].cancel()
            await until(lambda: server.app.boundary._open["ours"] == 1)
            assert (await stubs.generation.CountTokens(pb.CountTokensRequest(text="x"))).prompt_tokens == 1
            watches[1].cancel()


class SlowStart(FakeEngine):
    """Takes its time to load the model."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded_model = asyncio.Event()

    async def start(self) -> None:
        """Wait."""
        await self.loaded_model.wait()


async def test_not_ready(make_app: Callable[..., App]) -> None:
    """While the model loads the port is open, every call is UNAVAILABLE, and then it is not."""
    engine = SlowStart()
    app = make_app(engine)
    starting = asyncio.create_task(app.start())
    try:
        await until(lambda: app.port and app.http_port)
        async with stubs_to(f"127.0.0.1:{app.port}") as stubs:
            refusal = await refused(stubs.generation.Generate(ask(), timeout=5))
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "NOT_READY")
            assert refusal.retry_s == 5.0
            streamed = await refused(all_of(stubs.generation.GenerateStream(ask_stream(), timeout=5)))
            assert streamed.reason == "NOT_READY"
            uploading = asyncio.to_thread(upload, f"127.0.0.1:{app.port}", [apb.PublishAdapterRequest()])
            assert (await refused(uploading)).reason == "NOT_READY"
            engine.loaded_model.set()
            await starting
            assert (await stubs.generation.Generate(ask())).completions[0].text == "base heard: hi"
    finally:
        engine.loaded_model.set()
        await starting
        await app.stop()


async def test_draining() -> None:
    """A draining server finishes what it has and refuses the rest."""
    with fake_server(drain_s=5) as server:
        engine_of(server).token_interval_s = 0.02
        async with stubs_to(server.target) as stubs:
            stream = stubs.generation.GenerateStream(ask_stream())
            first = await first_of(stream)
            draining = asyncio.run_coroutine_threadsafe(server.app.drain(), server._loop)
            await until(lambda: server.app.admission.draining)
            refusal = await refused(stubs.generation.Generate(ask(), timeout=5))
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")
            assert refusal.retry_s is not None
            assert refusal.pushback_ms is not None
            assert first.text + "".join([message.text async for message in stream]) == "base heard: hi"
            await until(draining.done)


async def test_drain_limit(make_app: Callable[..., App]) -> None:
    """What is not done by the end of the drain is cut off with UNAVAILABLE, and the server stops in time."""
    async with running(make_app(FakeEngine(token_interval_s=0.01), drain_s=0.1)) as app:
        async with stubs_to(f"127.0.0.1:{app.port}") as stubs:
            stream = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless()))
            await first_of(stream)
            stopping = asyncio.create_task(app.stop())
            assert (await refused(all_of(stream))).code is Code.UNAVAILABLE
            await asyncio.wait_for(stopping, 3)


async def test_drain_limit_over_http(make_app: Callable[..., App]) -> None:
    """An answer over HTTP does not keep a server beyond the end of its drain, either."""
    async with running(make_app(FakeEngine(token_interval_s=0.5), drain_s=0.1)) as app:
        async with aiohttp.ClientSession() as session:
            asked = {"model": "fake-base", "prompt": "on" * 100, "max_tokens": 200, "temperature": 0, "stream": True}
            async with session.post(f"http://127.0.0.1:{app.http_port}/v1/completions", json=asked) as answer:
                assert b"text" in await answer.content.readline()
                await asyncio.wait_for(app.stop(), 10)
                with pytest.raises(aiohttp.ClientError):
                    await answer.content.read()


async def test_engine_died() -> None:
    """An engine that is dead for good: UNAVAILABLE for who is in flight, with their tokens' number, and who comes after."""
    with fake_server(max_restarts=0) as server:
        engine = engine_of(server)
        engine.token_interval_s = 0.01
        async with stubs_to(server.target) as stubs:
            stream = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless()))
            await first_of(stream)
            engine.alive = False
            in_flight = await refused(all_of(stream))
            after = await refused(stubs.generation.Generate(ask(), timeout=5))
            for refusal in (in_flight, after):
                assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "ENGINE_DIED")
                assert refusal.pushback_ms == 5000
            assert int(in_flight.metadata["tokens_sent"]) > 0
            assert f"{in_flight.metadata['tokens_sent']} tokens" in in_flight.message


@pytest.mark.slow
async def test_engine_died_and_came_back() -> None:
    """A killed engine: a stream that has begun ends UNAVAILABLE with its count of tokens; everybody else gets an answer."""
    with fake_server(max_running=3) as server:
        engine = engine_of(server)
        version = server.publish("survivor")
        engine.token_interval_s = 0.04  # slow enough that all six are seen together
        async with stubs_to(server.target) as stubs:
            assert (await stubs.generation.Generate(ask(adapter="survivor"))).adapter.version == version
            stream = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless()))
            received = [await first_of(stream)]
            others = [asyncio.ensure_future(stubs.generation.Generate(ask(adapter="survivor"))) for _ in range(6)]
            await until(lambda: server.app.admission.waiting == 4 and len(engine.running) == 3)
            await asyncio.sleep(0.1)  # two unary answers are under way
            engine.alive = False

            async def read() -> None:
                async for message in stream:
                    received.append(message)  # noqa: PERF401 - what came before the error counts

            refusal = await refused(read())
            assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "ENGINE_DIED")
            tokens = sum(len(message.token_ids) for message in received)
            assert refusal.metadata["tokens_sent"] == str(tokens)
            answers = await asyncio.gather(*others)
        text = f"survivor@{version} heard: hi"
        assert {answer.completions[0].text for answer in answers} == {text}
        assert {answer.usage.completion_tokens for answer in answers} == {len(text) + 1}


async def test_an_adapter_that_makes_nan() -> None:
    """Its request ends typed, the version gets no more, `show` and the metrics say so, and nobody else notices."""
    with fake_server() as server:
        engine = engine_of(server)
        version = server.publish("wild")
        async with stubs_to(server.target) as stubs:
            await stubs.adapters.PinAdapter(apb.PinAdapterRequest(adapter="wild", pinned=True))
            engine.not_finite.add(f"wild@{version}")
            first = await refused(stubs.generation.Generate(ask(adapter="wild")))
            assert (first.code, first.reason) == (Code.FAILED_PRECONDITION, "NOT_FINITE")
            again = await refused(stubs.generation.Generate(ask(adapter="wild")))
            assert (again.code, again.reason) == (Code.FAILED_PRECONDITION, "QUARANTINED")
            assert f"wild@{version}" in again.message
            assert again.resource
            assert again.metadata["fix"]
            assert not engine.loaded
            assert (await stubs.generation.Generate(ask())).completions[0].text == "base heard: hi"
            shown = await stubs.adapters.GetAdapter(apb.GetAdapterRequest(name="wild"))
            assert "quarantine" in shown.versions[0].warnings[0]
            assert b"loraplex_quarantined 1.0" in server.app.metrics.text()
            server.promote("wild", server.publish("wild"))
            assert (await stubs.generation.Generate(ask(adapter="wild"))).completions[0].text == "wild@v2 heard: hi"


async def test_a_base_that_makes_nan() -> None:
    """The base makes no NaN by itself: what does is replaced, and the request gets its answer from the next engine."""
    with fake_server() as server:
        engine = engine_of(server)
        engine.not_finite.add("base")
        async with stubs_to(server.target) as stubs:
            asking = asyncio.ensure_future(stubs.generation.Generate(ask()))
            await until(lambda: not server.app.engine.ready)
            engine.not_finite.clear()
            assert (await asking).completions[0].text == "base heard: hi"


@pytest.fixture(scope="module")
def slow_server() -> Iterator[FakeServer]:
    """A server that makes a token every five milliseconds."""
    with fake_server(max_running=2) as server:
        engine_of(server).token_interval_s = 0.005
        yield server


def is_idle(server: FakeServer) -> bool:
    """Whether nothing is left of any request."""
    return not engine_of(server).running and server.app.admission.running == 0 and server.app.admission.waiting == 0


@pytest.mark.parametrize("streaming", [False, True])
async def test_deadline(slow_server: FakeServer, streaming: bool) -> None:
    """A deadline that passes is DEADLINE_EXCEEDED, and the engine is free at once."""
    async with stubs_to(slow_server.target) as stubs:
        if streaming:
            request = pb.GenerateStreamRequest(request=endless())
            refusal = await refused(all_of(stubs.generation.GenerateStream(request, timeout=0.2)))
        else:
            refusal = await refused(stubs.generation.Generate(endless(), timeout=0.2))
        assert refusal.code is Code.DEADLINE_EXCEEDED
        await until(lambda: is_idle(slow_server), seconds=1)


async def test_cancel_unary(slow_server: FakeServer) -> None:
    """Cancelling a unary call frees the engine."""
    async with stubs_to(slow_server.target) as stubs:
        call = stubs.generation.Generate(endless())
        sent = asyncio.ensure_future(call)
        await until(lambda: engine_of(slow_server).running)
        call.cancel()
        await asyncio.gather(sent, return_exceptions=True)
        await until(lambda: is_idle(slow_server), seconds=1)


async def test_cancel_stream(slow_server: FakeServer) -> None:
    """Cancelling mid-stream frees the engine."""
    async with stubs_to(slow_server.target) as stubs:
        stream = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless()))
        await first_of(stream)
        stream.cancel()
        await until(lambda: is_idle(slow_server), seconds=1)


async def test_cancel_while_waiting(slow_server: FakeServer) -> None:
    """Cancelling in the queue gives the place in the queue back."""
    async with stubs_to(slow_server.target) as stubs:
        streams = [stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless())) for _ in range(2)]
        for stream in streams:
            await first_of(stream)
        waiting = stubs.generation.GenerateStream(ask_stream())
        reading = asyncio.ensure_future(first_of(waiting))
        await until(lambda: slow_server.app.admission.waiting == 1)
        waiting.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: slow_server.app.admission.waiting == 0, seconds=1)
        for stream in streams:
            stream.cancel()
        await until(lambda: is_idle(slow_server), seconds=1)


async def test_cancel_with_a_slow_reader() -> None:
    """A reader who stops reading stops its own stream only; when it leaves, the engine is free."""
    with fake_server(context_length=1_000_000, max_message_mib=16) as server:
        async with stubs_to(server.target) as stubs:
            request = ask("x" * 1000, max_tokens=900_000, ignore_eos=True, logprobs=20)
            stream = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request))
            await first_of(stream)
            await asyncio.sleep(0.5)  # by now the server's writes are blocked
            assert (await stubs.generation.Generate(ask())).completions[0].text == "base heard: hi"
            stream.cancel()
            await until(lambda: is_idle(server), seconds=2)


async def test_client_that_vanishes(slow_server: FakeServer) -> None:
    """A connection that is closed frees whatever it had asked for."""
    async with stubs_to(slow_server.target) as stubs:
        stream = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=endless()))
        await first_of(stream)
    await until(lambda: is_idle(slow_server), seconds=1)


async def test_message_over_the_limit() -> None:
    """A message above max_message_mib is refused, and the connection lives."""
    with fake_server(max_message_mib=1) as server:
        async with stubs_to(server.target) as stubs:
            refusal = await refused(stubs.generation.Generate(ask("x" * 2_000_000)))
            assert refusal.code is Code.RESOURCE_EXHAUSTED
            assert (await stubs.generation.Generate(ask())).completions[0].text == "base heard: hi"
