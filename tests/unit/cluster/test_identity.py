"""A router before servers that ask who calls: it passes credentials on, and tells nobody more than a server would."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2 as apb
from engine.api.loraplex.v1 import engine_pb2 as epb
from engine.client import AsyncClient, NotFound, PermissionDenied, ResourceExhausted, Unauthenticated
from engine.client.testing import write_adapter
from engine.cluster.fleet import StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from engine.runtime.fake import FakeEngine
from engine.server.app import App
from tests.unit.cluster.conftest import Cluster, StartCluster
from tests.unit.identity.conftest import Authority, make_keys
from tests.unit.server.conftest import Stubs, all_of, ask, ask_stream, refused, running, settings_in, until

Code = grpc.StatusCode
TENANTS: dict[str, dict[str, Any]] = {
    "ops": {"roles": ["admin"], "adapters": ["*"], "base": True},
    "acme": {"roles": ["invoke"], "adapters": ["acme-*"], "limits": {"requests_per_s": 0.01, "burst": 2}},
    "rival": {"roles": ["invoke", "publish", "promote"], "adapters": ["rival-*"]},
    "router": {"roles": ["observe"], "adapters": ["*"]},
}


async def test_credentials_go_through(start: StartCluster, tmp_path: Path) -> None:
    """Rights and quotas hold through the router, by the servers' own words, and the router's own key helps nobody."""
    keys = make_keys(TENANTS)
    policy, own = keys.write(tmp_path / "policy.yaml"), tmp_path / "router.key"
    own.write_text(keys.of["router"] + "\n")
    settings: dict[str, Any] = {"policy": policy, "audit_log": tmp_path / "audit.jsonl"}
    async with start(2, **settings, router={"replica_key_file": own, "reflection": False}) as cluster:
        target = f"127.0.0.1:{cluster.router.port}"
        async with AsyncClient(target, api_key=keys.of["ops"], timeout_s=20, retries=0) as ops:
            for seed, name in enumerate(("acme-bot", "rival-bot")):
                write_adapter(tmp_path / name, seed)
                await ops.adapters.publish(tmp_path / name, name)
                await ops.adapters.promote(name, "v1", actor="me")
                await ops.adapters.preload(name)
            assert (await ops.adapters.get("rival-bot")).history[-1].actor.startswith("ops (key:")
        async with AsyncClient(target, api_key=keys.of["rival"], timeout_s=20, retries=0) as rival:
            for refusal in (rival.adapters.promote("acme-bot", "v1"), rival.adapters.preload("acme-bot"),
                            rival.adapters.pin("rival-bot"), rival.generate(prompt="x", adapter="acme-nothing")):  # fmt: skip
                with pytest.raises(PermissionDenied):
                    await refusal
            with pytest.raises(NotFound) as missing:
                await rival.generate(prompt="x", adapter="rival-bat")
            assert "acme" not in str(missing.value)
            assert {one.name for one in (await rival.engine()).resident} == {"rival-bot"}
        async with AsyncClient(target, api_key=keys.of["acme"], timeout_s=20, retries=0) as acme:
            asked = [acme.generate(prompt="x", adapter="acme-bot", temperature=0) for _ in range(2 * 2 + 1)]
            results = await asyncio.gather(*asked, return_exceptions=True)  # each of the two servers counts for itself
            refusals = [one for one in results if isinstance(one, ResourceExhausted)]
            assert 1 <= len(refusals) <= 3
            assert {getattr(one, "text", one) for one in results if one not in refusals} == {"acme-bot@v1 heard: x"}
        for call in (
            cluster.stubs.generation.Generate(ask(adapter="acme-bot")),
            cluster.stubs.engine.GetEngine(epb.GetEngineRequest()),
            cluster.stubs.adapters.ListAdapters(apb.ListAdaptersRequest()),
            cluster.stubs.adapters.PinAdapter(apb.PinAdapterRequest(adapter="acme-bot")),
        ):
            assert (await refused(call)).code is Code.UNAUTHENTICATED
    acts = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {act["forwarded_for"].partition(":")[0] for act in acts} == {"ipv4"}


@pytest.mark.parametrize("with_key", [True, False])
async def test_tls_on_both_legs(tmp_path: Path, with_key: bool) -> None:
    """With TLS to the router and mutual TLS behind it, the router's certificate is not its callers' credential."""
    authority = Authority()
    for name in ("server", "router"):
        for path, data in zip(
            (f"{name}.crt", f"{name}.key"), authority.issue(name, f"spiffe://test/{name}"), strict=True
        ):
            (tmp_path / path).write_bytes(data)
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    tenants = TENANTS | {"router": {"roles": ["admin"], "adapters": ["*"], "certificates": ["spiffe://test/router"]}}
    keys = make_keys(tenants)
    own = tmp_path / "router.key.txt"
    own.write_text(keys.of["router"])
    files = {"tls_certificate": tmp_path / "server.crt", "tls_key": tmp_path / "server.key"}
    settings = settings_in(
        tmp_path, policy=keys.write(tmp_path / "policy.yaml"), audit_log=tmp_path / "audit", **files,
        tls_client_ca=tmp_path / "ca.crt",
    )  # fmt: skip
    async with running(App(settings, FakeEngine())) as app:
        address = f"localhost:{app.port}"
        router = RouterApp(
            RouterSettings(
                replicas=address, port=0, http_port=0, drain_s=0, poll_s=0.05, give_up_s=1, **files,
                replica_tls_ca=tmp_path / "ca.crt", replica_tls_certificate=tmp_path / "router.crt",
                replica_tls_key=tmp_path / "router.key", replica_key_file=own if with_key else None,
            ),
            StaticSource([address]),
        )  # fmt: skip
        await router.start()
        try:
            await _through(router, authority, keys.of["ops"], tmp_path)
        finally:
            await router.stop()


async def _through(router: RouterApp, authority: Authority, key: str, folder: Path) -> None:
    tls = grpc.ssl_channel_credentials(authority.pem)
    target = f"localhost:{router.port}"
    write_adapter(folder / "adapter")
    async with AsyncClient(target, credentials=tls, api_key=key, timeout_s=20, retries=0) as client:
        await client.adapters.publish(folder / "adapter", "bot")
        await client.adapters.promote("bot", "v1")
        assert (await client.generate(prompt="x", adapter="bot", temperature=0)).text == "bot@v1 heard: x"
    async with AsyncClient(target, credentials=tls, timeout_s=20, retries=0) as nobody:
        for call in (nobody.generate(prompt="x"), nobody.adapters.unload("bot"), nobody.engine()):
            with pytest.raises(Unauthenticated):
                await call
    async with aio.secure_channel(target, tls) as channel:
        claimed = (("x-loraplex-forwarded", ""), ("x-loraplex-tenant", "ops"))
        refusal = await refused(Stubs(channel).generation.Generate(ask(adapter="bot"), metadata=claimed))
        assert refusal.code is Code.UNAUTHENTICATED


async def test_a_stream_goes_on_under_a_policy(start: StartCluster, tmp_path: Path) -> None:
    """The rest of a stream is answered elsewhere, though the router asks for it before all others and no tenant may."""
    keys = make_keys({"acme": {"base": True}, "router": TENANTS["router"]})
    own = tmp_path / "router.key"
    own.write_text(keys.of["router"])
    settings: dict[str, Any] = {"policy": keys.write(tmp_path / "policy.yaml"), "audit_log": tmp_path / "audit"}
    async with start(2, token_interval_s=0.005, **settings, router={"replica_key_file": own}) as cluster:
        messages = await _cut_off(cluster, "x" * 60, keys.header("acme"), 10)
    assert "".join(message.text for message in messages) == "base heard: " + "x" * 60
    assert messages[-1].failovers == 1


async def test_a_stream_goes_on_under_a_tight_quota(start: StartCluster, tmp_path: Path) -> None:
    """Servers charge for what they read of it, each for itself, and none refuses it for that, even if all fail in turn."""
    keys = make_keys({"acme": {"base": True, "limits": {"tokens_per_min": 110}}, "router": TENANTS["router"]})
    own = tmp_path / "router.key"
    own.write_text(keys.of["router"])
    settings: dict[str, Any] = {"policy": keys.write(tmp_path / "policy.yaml"), "audit_log": tmp_path / "audit"}
    async with start(2, token_interval_s=0.005, **settings, router={"replica_key_file": own}) as cluster:
        messages = await _cut_off(cluster, "x" * 60, keys.header("acme"), 10, 20, 30, 40, 50)
        assert "".join(message.text for message in messages) == "base heard: " + "x" * 60
        assert messages[-1].failovers == 5
        for _ in range(2):
            over = await refused(cluster.stubs.generation.Generate(ask("x"), metadata=keys.header("acme")))
            assert over.reason == "QUOTA_EXCEEDED"


async def _cut_off(cluster: Cluster, prompt: str, metadata: Any, *after: int) -> list[Any]:
    """A stream whose replica is lost to the router after so many of its messages."""
    messages: list[Any] = []
    async for message in cluster.stubs.generation.GenerateStream(ask_stream(prompt), metadata=metadata):
        messages.append(message)
        if len(messages) in after:
            cluster.router.fleet.links[cluster.addresses[cluster.busy()]].give_up()
    return messages


async def test_a_stream_waits_for_its_tenants_turn(start: StartCluster, tmp_path: Path) -> None:
    """An answer that lost its replica goes on at another one as soon as its tenant's other requests there leave room."""
    tenants = TENANTS | {"acme": {"roles": ["invoke"], "base": True, "limits": {"concurrent": 1}}}
    keys = make_keys(tenants)
    own = tmp_path / "router.key"
    own.write_text(keys.of["router"] + "\n")
    settings: dict[str, Any] = {"policy": keys.write(tmp_path / "policy.yaml"), "audit_log": tmp_path / "audit.jsonl"}
    async with start(
        2, token_interval_s=0.01, **settings, router={"replica_key_file": own, "give_up_s": 20}
    ) as cluster:
        prompts = [f"a rather long prompt, {number}, so that its answer is long" for number in range(2)]

        async def answer(prompt: str) -> tuple[str, int]:
            call = cluster.stubs.generation.GenerateStream(ask_stream(prompt), metadata=keys.header("acme"))
            messages = await all_of(call)
            return "".join(one.text for one in messages), messages[-1].failovers

        first = asyncio.create_task(answer(prompts[0]))
        await until(lambda: any(engine.running for engine in cluster.engines))
        busy = cluster.busy()
        cluster.router.fleet.links[cluster.addresses[busy]].replica.sent += 40  # the other one is asked next
        second = asyncio.create_task(answer(prompts[1]))
        await until(lambda: all(engine.running for engine in cluster.engines))
        await asyncio.sleep(0.1)
        server = cluster.apps[busy]._server
        assert server
        await server.stop(None)
        assert await second == (f"base heard: {prompts[1]}", 0)
        assert await first == (f"base heard: {prompts[0]}", 1)


async def test_headers_that_grpc_cannot_carry(start: StartCluster, tmp_path: Path) -> None:
    """Over HTTP, letters that no metadata may have make a credential wrong and a trace unknown; no call fails for them."""
    keys = make_keys(TENANTS)
    settings: dict[str, Any] = {"policy": keys.write(tmp_path / "policy.yaml"), "audit_log": tmp_path / "audit"}
    own = tmp_path / "router.key"
    own.write_text(keys.of["router"])
    good = f"Authorization: Bearer {keys.of['ops']}\r\n".encode()
    async with start(1, **settings, router={"replica_key_file": own}) as cluster:
        for status, headers in (
            (b" 401 ", b"Authorization: Bearer \xff\r\n"),
            (b" 401 ", b"Authorization: Bearer lpx_\xc3\xa9\r\n"),
            (b" 200 ", good + b"tracestate: a=\xff\r\n"),
            (b" 200 ", good + b"traceparent: \xc3\xa9\r\n"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", cluster.router.http_port)
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
            assert status in await reader.readline(), headers
            writer.close()


async def test_the_console_of_a_router(start: StartCluster, tmp_path: Path) -> None:
    """It offers what the servers' policy allows, and a wrong key is said to be wrong."""
    keys = make_keys(TENANTS)
    settings: dict[str, Any] = {"policy": keys.write(tmp_path / "policy.yaml"), "audit_log": tmp_path / "audit"}
    own = tmp_path / "router.key"
    own.write_text(keys.of["router"])
    async with start(1, **settings, router={"replica_key_file": own}) as cluster, aiohttp.ClientSession() as http:

        async def me(key: str) -> tuple[int, Any]:
            url = f"http://localhost:{cluster.router.http_port}/console/me"
            async with http.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}) as answer:
                return answer.status, await answer.json()

        assert await me(keys.of["acme"]) == (200, {"identified": True, "tenant": "acme", "roles": ["invoke"]})
        assert len((await me(keys.of["ops"]))[1]["roles"]) > 3
        for key in ("", "lpx_wrong"):
            assert (await me(key))[0] == 401


async def test_key_that_replicas_refuse(start: StartCluster, tmp_path: Path) -> None:
    """A router whose own key is wrong has no replicas, and says so as one without any."""
    keys = make_keys(TENANTS)
    own = tmp_path / "router.key"
    own.write_text("lpx_wrong")
    settings: dict[str, Any] = {"policy": keys.write(tmp_path / "policy.yaml"), "audit_log": tmp_path / "audit"}
    async with start(1, **settings, router={"replica_key_file": own, "give_up_s": 0}) as cluster:
        call = cluster.stubs.generation.Generate(ask(), metadata=keys.header("ops"))
        assert (await refused(call)).reason == "NO_REPLICA"
