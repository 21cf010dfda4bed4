"""Rights: who may call what, on which adapter, and that nobody learns what they may not use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2 as apb
from engine.api.loraplex.v1 import adapters_pb2_grpc
from engine.api.loraplex.v1 import engine_pb2 as epb
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client.testing import FakeServer
from engine.errors import AdapterNotFound, PermissionDenied
from engine.server.grpc_server import SERVICES
from engine.server.identity.principal import Principal, Role
from engine.server.identity.rights import NEEDS, PACKAGE, need_of
from tests.unit.identity.conftest import Keys, token
from tests.unit.server.conftest import Refusal, Stubs, all_of, ask, ask_stream, first_of, refused, until

Code = grpc.StatusCode
METHODS = {f"{service.name}/{method.name}": method for service in SERVICES for method in service.methods}


def test_every_method_has_a_rule() -> None:
    """Every method of ours is in the table, and nothing else; the field that names the adapter exists."""
    assert set(METHODS) == set(NEEDS)
    for method, need in NEEDS.items():
        message = METHODS[method].input_type
        for part in filter(None, need.field.split(".")):
            field = message.fields_by_name[part]
            message = field.message_type
        names = {"name", "adapter", "header", "request"} & set(METHODS[method].input_type.fields_by_name)
        assert bool(names) == bool(need.field), method


def test_method_without_a_rule() -> None:
    """A method that somebody adds and forgets in the table is refused to everybody."""
    with pytest.raises(PermissionDenied):
        need_of(f"{PACKAGE}AdapterService/DropEverything")
    assert need_of("/grpc.health.v1.Health/Check") is None


def test_patterns() -> None:
    """A pattern stands for whole names: no prefix, no suffix, no path gets around it; no pattern matches nothing."""
    principal = Principal("t", roles=frozenset({Role.INVOKE}), adapters=("support", "legal-*", "*-x-*"), base=False)
    for name in ("support", "support@v2", "legal-", "legal-a.b", "a-x-b"):
        assert principal.may(Role.INVOKE, name), name
    for name in (
        "supports",
        "asupport",
        "support\n",
        "legal",
        "xlegal-a",
        "",
        "@support",
        "../support",
        "Support",
        "a@legal-b",
    ):
        assert not principal.may(Role.INVOKE, name), name
    assert not Principal("t", roles=frozenset({Role.INVOKE}), adapters=(), base=True).uses("anything")


def requests() -> Iterator[tuple[str, Any]]:
    """A valid message for every method, about the adapter rival-bot."""
    named = {
        "name": "rival-bot",
        "adapter": "rival-bot",
        "version": "v1",
        "alias": "canary",
        "record_json": "{}",
        "weight": 0.5,
    }
    for method, found in METHODS.items():
        message = found.input_type._concrete_class()
        match method.partition("/")[2]:
            case "Generate" | "CountTokens":
                message.text = "hi"
                if method.endswith("Generate"):
                    message.adapter = "rival-bot"
            case "GenerateStream":
                message = ask_stream(adapter="rival-bot")
            case "PublishAdapter":
                message.header.name = "rival-bot"
            case _:
                for field, value in named.items():
                    if field in found.input_type.fields_by_name:
                        setattr(message, field, value)
        yield method, message


def published(target: str, message: Any, metadata: Any) -> Any:
    """Send one message of an upload; blocks, and returns the first that comes back."""
    with grpc.insecure_channel(target) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        return next(stub.PublishAdapter(iter([message]), timeout=10, metadata=metadata))


def call(server: FakeServer, channel: aio.Channel, method: str, message: Any, metadata: Any) -> Any:
    """Call it and take the first message that comes back."""
    found = METHODS[method]
    reply = found.output_type._concrete_class
    path = f"{PACKAGE}{method}"
    write, read = type(message).SerializeToString, reply.FromString
    if found.client_streaming:  # through threads: grpc.aio loses the status of a server that refuses a stream early
        return asyncio.to_thread(published, server.target, message, metadata)
    if found.server_streaming:
        return first_of(channel.unary_stream(path, write, read)(message, timeout=10, metadata=metadata))
    return channel.unary_unary(path, write, read)(message, timeout=10, metadata=metadata)


NOT_KNOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "nothing": (),
    "a wrong key": (("authorization", "Bearer lpx_aaaaaaaaaaaa_" + "A" * 43),),
    "no scheme": (("authorization", "lpx_aaaaaaaaaaaa_" + "A" * 43),),
    "Basic": (("authorization", "Basic b3BzOm9wcw=="),),
    "an oversized token": (("authorization", "Bearer " + "a" * 7169),),
    "an expired token": (("authorization", f"Bearer {token(exp=1)}"),),
    "a tenant's name alone": (("x-loraplex-tenant", "ops"),),
}


@pytest.mark.parametrize("who", NOT_KNOWN)
async def test_unknown_callers(server: FakeServer, stubs: Stubs, who: str) -> None:
    """Every method refuses who is not known, whatever they say, before it looks at the message."""
    for method, message in requests():
        refusal = await refused(call(server, stubs.channel, method, message, NOT_KNOWN[who]))
        assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED"), method
        assert "lpx_aaaa" not in refusal.message


async def test_two_authorizations(stubs: Stubs, keys: Keys) -> None:
    """Two credentials in one call are refused: a proxy and we could read different ones."""
    both = (*keys.header("acme"), *keys.header("ops"))
    assert (await refused(stubs.engine.GetEngine(epb.GetEngineRequest(), metadata=both))).code is Code.UNAUTHENTICATED


async def test_roles(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """What needs a role is refused to a tenant without it, and an admin may do everything."""
    for method, message in requests():
        need = NEEDS[method]
        if need.role is None:
            continue
        refusal = await refused(call(server, stubs.channel, method, message, keys.header("watcher")))
        assert refusal.code is Code.PERMISSION_DENIED, method
        assert need.role in refusal.message
        problem = None
        try:
            await call(server, stubs.channel, method, message, keys.header("ops"))
        except aio.AioRpcError as error:
            problem = error.code()
        assert problem not in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.UNKNOWN, Code.INTERNAL), method


async def test_credentials_of_each_kind(stubs: Stubs, keys: Keys) -> None:
    """A key and a token both say who calls; the scheme's case does not matter."""
    for value in (f"Bearer {keys.of['acme']}", f"bearer {keys.of['acme']}", f"Bearer {token()}"):
        answer = await stubs.generation.Generate(ask(adapter="acme-bot"), metadata=(("authorization", value),))
        assert answer.adapter.name == "acme-bot"


def sayings(refusal: Refusal) -> Any:
    """All that a refusal tells, but for the request's id."""
    refusal.metadata.pop("request_id")
    return refusal


async def test_an_adapter_that_is_not_on_the_list(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """Of an adapter that a tenant may not use, it cannot learn whether it exists: not by code, text, details or trailers."""
    ops = keys.header("ops")
    server.publish("rival-robot")  # near enough to be suggested
    for method, message in requests():
        need = NEEDS[method]
        if not need.field or need.role not in (None, Role.INVOKE):
            continue
        there = await refused(call(server, stubs.channel, method, message, keys.header("acme")))
        text = str(message).replace("rival-bot", "rival-xxx")
        absent = text_format.Parse(text, type(message)())
        gone = await refused(call(server, stubs.channel, method, absent, keys.header("acme")))
        assert there.code is Code.PERMISSION_DENIED, method
        gone.message = gone.message.replace("rival-xxx", "rival-bot")
        assert sayings(there) == sayings(gone), method
        assert "robot" not in str(there)
    assert "rival-robot" in str(await refused(stubs.generation.Generate(ask(adapter="rival-robo"), metadata=ops)))


async def test_suggestions(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """The nearest names of a mistyped one are the tenant's own."""
    server.publish("acme-invoices")
    server.publish("invoices-acme")
    refusal = await refused(stubs.generation.Generate(ask(adapter="acme-invoise"), metadata=keys.header("acme")))
    assert refusal.code is Code.NOT_FOUND
    assert "acme-invoices" in refusal.message
    assert "invoices-acme" not in str(refusal)
    error = Principal("t", adapters=("a*",)).shown(AdapterNotFound("ab", ["abc", "xab@v1"]))
    assert "xab" not in error.message


async def test_lists(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """Lists, residents and activity hold what the tenant may use; who observes sees all."""
    for name in ("acme-bot", "rival-bot", "shared"):
        await stubs.generation.Generate(ask(adapter=name), metadata=keys.header("ops"))
    await stubs.generation.Generate(ask(adapter="acme-bot"), metadata=keys.header("acme"))
    seen = {}
    for tenant in ("acme", "watcher"):
        who = keys.header(tenant)
        listed = await stubs.adapters.ListAdapters(apb.ListAdaptersRequest(), metadata=who)
        engine = await stubs.engine.GetEngine(epb.GetEngineRequest(), metadata=who)
        activity = await stubs.engine.GetActivity(epb.GetActivityRequest(), metadata=who)
        seen[tenant] = str(listed) + str(engine) + str(activity)
        assert {one.name for one in activity.tenants} == ({"acme"} if tenant == "acme" else {"acme", "ops"})
    assert "acme-bot" in seen["acme"]
    assert "shared" in seen["acme"]
    assert "rival" not in seen["acme"]
    assert "rival-bot" in seen["watcher"]


async def test_watch(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """A watch tells of the tenant's own adapters only."""
    heard: list[str] = []

    async def listen() -> None:
        async for message in stubs.adapters.WatchAdapters(apb.WatchAdaptersRequest(), metadata=keys.header("acme")):
            heard.append(message.name)  # noqa: PERF401 - it is cancelled in the middle

    listening = asyncio.create_task(listen())
    await until(lambda: heard == [""])
    await asyncio.to_thread(server.publish, "rival-watched")
    await asyncio.to_thread(server.publish, "acme-watched")
    await until(lambda: len(heard) > 1)
    listening.cancel()
    assert set(heard) == {"", "acme-watched"}


async def test_base_model(stubs: Stubs, keys: Keys) -> None:
    """The base model needs a word in the policy too."""
    refusal = await refused(stubs.generation.Generate(ask(), metadata=keys.header("acme")))
    assert (refusal.code, "base model" in refusal.message) == (Code.PERMISSION_DENIED, True)
    assert (await stubs.generation.Generate(ask(), metadata=keys.header("rival"))).usage.completion_tokens


async def test_the_tenant_is_the_one_who_was_authenticated(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """Whatever tenant a caller names, it is counted as the one whose credentials it showed."""
    named = (*keys.header("rival"), ("x-loraplex-tenant", "ghost"))
    await stubs.generation.Generate(ask(), metadata=named)
    names = {one.name for one in server.app.activity.snapshot(ready=True).tenants}
    assert "ghost" not in names
    assert "rival" in names


async def test_calls_at_once_keep_apart(stubs: Stubs, keys: Keys) -> None:
    """Callers at the same time on one connection are told apart."""

    async def one(number: int) -> bool:
        tenant = ("acme", "rival")[number % 2]
        refusal = None
        try:
            answer = await stubs.generation.Generate(ask(adapter="acme-bot"), metadata=keys.header(tenant))
        except aio.AioRpcError as error:
            refusal = error.code()
        return (refusal is Code.PERMISSION_DENIED) if tenant == "rival" else (answer.adapter.name == "acme-bot")

    assert all(await asyncio.gather(*map(one, range(60))))


async def test_upload_by_name(server: FakeServer, keys: Keys) -> None:
    """An upload is refused by the name in its header, before anything of it is kept."""
    message = apb.PublishAdapterRequest(header=apb.PublishHeader(name="acme-bot"))

    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(published, server.target, message, keys.header("rival"))
    assert Refusal.of(caught.value).code is Code.PERMISSION_DENIED


def reflected(target: str, metadata: Any) -> bytes:
    """Which services the server says that it has; blocks."""
    with grpc.insecure_channel(target) as channel:
        reflect = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        found: bytes = next(reflect(iter([b"\x3a\x00"]), timeout=10, metadata=metadata))
        return found


async def test_open_services(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """Health needs no credentials, reflection does unless the policy opens it, and an unknown method says nothing."""
    check = stubs.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await check(b"") == b"\x08\x01"
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(reflected, server.target, ())
    assert caught.value.code() is Code.UNAUTHENTICATED
    assert await asyncio.to_thread(reflected, server.target, keys.header("watcher"))
    missing = stubs.channel.unary_unary(f"{PACKAGE}AdapterService/Nothing")
    assert (await refused(missing(b""))).code in (Code.UNIMPLEMENTED, Code.PERMISSION_DENIED)


async def test_names_that_play_tricks(stubs: Stubs, keys: Keys) -> None:
    """A name that is a path, or has characters of its own, is no name, whoever asks."""
    for name in (
        "../rival-bot",
        "acme-bot/../rival-bot",
        "acme-*",
        "acme-bot\x00",
        "ACME-bot",
        "acme-bot@../v1",
        "\u0430cme-bot",
    ):
        refusal = await refused(stubs.generation.Generate(ask(adapter=name), metadata=keys.header("acme")))
        assert refusal.code is Code.INVALID_ARGUMENT, name


async def test_header_injection(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """What looks like a second header within a value is part of the value (gRPC itself refuses line breaks)."""
    sly = (("authorization", f"Bearer {keys.of['acme']} authorization: Bearer {keys.of['ops']}"),)
    assert (await refused(stubs.engine.GetEngine(epb.GetEngineRequest(), metadata=sly))).code is Code.UNAUTHENTICATED


async def test_who_signs(server: FakeServer, stubs: Stubs, keys: Keys) -> None:
    """Histories name who was authenticated; what the caller calls itself comes after it."""
    version = await asyncio.to_thread(server.publish, "rival-signed")
    asked = apb.SetAliasRequest(name="rival-signed", alias="current", version=version, actor="root")
    await all_of(stubs.adapters.SetAlias(asked, metadata=keys.header("rival")))
    found = await stubs.adapters.GetAdapter(apb.GetAdapterRequest(name="rival-signed"), metadata=keys.header("rival"))
    identity = keys.of["rival"].split("_")[1]
    assert found.history[-1].actor == f"rival (key:{identity}) for root"
    assert found.versions[0].publisher.startswith("ops (key:")


async def test_count_tokens_is_not_for_everybody(stubs: Stubs, keys: Keys) -> None:
    """Counting tokens is part of asking."""
    asked = pb.CountTokensRequest(text="hi")
    assert (await stubs.generation.CountTokens(asked, metadata=keys.header("acme"))).prompt_tokens == 2
    assert (
        await refused(stubs.generation.CountTokens(asked, metadata=keys.header("watcher")))
    ).code is Code.PERMISSION_DENIED
