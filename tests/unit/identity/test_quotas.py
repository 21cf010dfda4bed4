"""Quotas: each limit holds, says when to come back, and is nobody else's business."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.client import AsyncClient
from engine.client.testing import write_adapter
from engine.errors import PermissionDenied, QuotaExceeded
from engine.runtime.engine import EngineRequest
from engine.runtime.fake import FakeEngine
from engine.server.app import App
from engine.server.identity.policy import Policy
from engine.server.identity.quotas import Bucket, Quotas
from tests.unit.identity.conftest import Keys, make_keys
from tests.unit.server.conftest import Stubs, all_of, ask, ask_stream, refused, running, settings_in, stubs_to, until
from tests.unit.server.test_resume import going_on

Code = grpc.StatusCode


def test_bucket() -> None:
    """It holds what it may, fills at its rate, and a debt is paid back first."""
    bucket = Bucket(rate=2, size=4, now=0)
    assert bucket.wait_s(4, 0) == 0
    bucket.take(10, 0)
    assert bucket.wait_s(1, 0) == 3.5
    assert bucket.wait_s(1, 3.5) == 0
    assert bucket.wait_s(5, 1000) == 0.5  # never more than its size
    bucket.change(rate=1, size=2, now=1000)
    assert bucket.wait_s(2, 1000) == 0
    assert bucket.wait_s(3, 1000) == 1


class Clock:
    """A clock that stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def quotas_of(clock: Clock, **tenants: dict[str, Any]) -> Quotas:
    """Quotas of tenants with these limits."""
    quotas = Quotas(lambda *_: None, clock)
    quotas.adopt(policy_of(**tenants))
    return quotas


def policy_of(**tenants: dict[str, Any]) -> Policy:
    """A policy of tenants with these limits."""
    return Policy.model_validate(
        {"version": 1, "tenants": {name: {"limits": limits} for name, limits in tenants.items()}}
    )


def use(quotas: Quotas, tenant: str = "acme", tokens: int = 0, *, goes_on: bool = False) -> float | None:
    """Make one short request; when to come back if it was refused."""
    allowance = quotas.of(tenant)
    try:
        with allowance.entered(goes_on=goes_on):
            allowance.spend(tokens)
    except QuotaExceeded as error:
        return error.retry_after_s
    return None


def test_requests_a_second() -> None:
    """A burst goes through, then one as often as the rate says; another tenant does not notice."""
    clock = Clock()
    quotas = quotas_of(clock, acme={"requests_per_s": 4, "burst": 2}, other={"requests_per_s": 4})
    assert [use(quotas) for _ in range(3)] == [None, None, 0.25]
    assert use(quotas, "other") is None
    clock.now = 0.25
    assert [use(quotas) for _ in range(2)] == [None, 0.25]


def test_tokens_a_minute() -> None:
    """Who has used more than the minute's tokens waits until the debt is paid; a refused request costs nothing."""
    clock = Clock()
    quotas = quotas_of(clock, acme={"tokens_per_min": 60, "requests_per_s": 1})
    assert use(quotas, tokens=80) is None
    clock.now = 10
    assert use(quotas) == pytest.approx(11)  # 20 of debt, less 10, and one to spend
    clock.now = 21
    assert use(quotas, tokens=1) is None


def test_rest_of_an_answer() -> None:
    """It may begin in debt, as far as another minute's tokens: a replica's death is not its tenant's doing."""
    clock = Clock()
    quotas = quotas_of(clock, acme={"tokens_per_min": 60})
    assert use(quotas, tokens=90) is None
    assert use(quotas) == 31
    assert use(quotas, tokens=60, goes_on=True) is None
    assert use(quotas, goes_on=True) == 31
    clock.now = 31
    assert use(quotas, goes_on=True) is None
    assert use(quotas) == 60


def test_at_once() -> None:
    """No more requests are open than may be, and one that ends makes room."""
    quotas = quotas_of(Clock(), acme={"concurrent": 2})
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(quotas.of("acme").entered())
        assert use(quotas) == 1.0
    assert use(quotas) is None


def test_policy_changes() -> None:
    """New limits hold at once, and what was used before counts; a tenant that is gone may do nothing."""
    clock = Clock()
    quotas = quotas_of(clock, acme={"requests_per_s": 1, "burst": 3, "weight": 2, "max_waiting": 5}, gone={})
    weights, waiting = quotas.weights, quotas.waiting_limits
    assert (weights, waiting) == ({"acme": 2.0, "gone": 1.0}, {"acme": 5})
    assert [use(quotas) for _ in range(2)] == [None, None]
    salt = quotas.of("acme").cache_salt
    quotas.adopt(policy_of(acme={"requests_per_s": 1, "burst": 2}))
    assert use(quotas) == 1.0
    assert quotas.of("acme").cache_salt == salt
    assert (weights, waiting) == ({"acme": 1.0}, {})
    with pytest.raises(PermissionDenied):
        quotas.of("gone")


def test_cache_salts() -> None:
    """Tenants share cached prefixes only if the policy says so; nobody can guess under which salt others' are."""
    tenants: dict[str, Any] = {name: {} for name in ("a", "b", "group")} | {"c": {"cache_group": "group"}}
    tenants["d"] = {"cache_group": "group"}

    def salts(**more: Any) -> dict[str, str]:
        quotas = Quotas(lambda *_: None)
        quotas.adopt(Policy.model_validate({"version": 1, "tenants": tenants} | more))
        return {name: quotas.of(name).cache_salt for name in tenants}

    found = salts()
    assert found["c"] == found["d"]
    assert len(set(found.values())) == 4
    assert set(found.values()).isdisjoint(salts().values())
    assert set(salts(share_prefix_cache=True).values()) == {""}


class Listening(FakeEngine):
    """Remembers under which salt each request came."""

    def __init__(self) -> None:
        super().__init__()
        self.salts: list[tuple[str, str]] = []

    def generate(self, request: EngineRequest) -> Any:
        self.salts.append((request.id[0], request.cache_salt))
        return super().generate(request)


async def test_salts_reach_the_engine(tmp_path: Path) -> None:
    """Each tenant's requests come with its own salt, and the copies for a shadow with their original's."""
    keys = make_keys({"a": {"roles": ["admin"], "adapters": ["*"], "base": True}, "b": {"adapters": ["*"]}})
    engine = Listening()
    settings = settings_in(tmp_path, policy=keys.write(tmp_path / "policy.yaml"), audit_log=tmp_path / "a")
    write_adapter(tmp_path / "one", seed=1)
    write_adapter(tmp_path / "two", seed=2)
    async with running(App(settings, engine)) as app:
        target = f"127.0.0.1:{app.port}"
        async with (
            AsyncClient(target, api_key=keys.of["a"]) as first,
            AsyncClient(target, api_key=keys.of["b"]) as second,
        ):
            for folder in ("one", "two"):
                await first.adapters.publish(tmp_path / folder, "bot")
            await first.adapters.promote("bot", "v1")
            await first.adapters.set_shadow("bot", 1.0, version="v2")
            engine.salts.clear()
            for client in (first, second, first):
                await client.generate(adapter="bot", prompt="hi", temperature=0)
                await until(lambda: len(engine.salts) % 2 == 0)
    asked = [salt for kind, salt in engine.salts if kind == "g"]
    copied = [salt for kind, salt in engine.salts if kind == "s"]
    assert asked == copied
    assert asked[0] == asked[2] != asked[1]
    assert all(len(salt) == 64 for salt in asked)


LIMITED: dict[str, dict[str, Any]] = {
    "small": {"base": True, "limits": {"concurrent": 1, "max_tokens": 20, "max_priority": 3, "requests_per_s": 1000}},
    "slow": {"base": True, "limits": {"requests_per_s": 0.5, "burst": 1}},
    "thrifty": {"base": True, "limits": {"tokens_per_min": 30}},
    "queueing": {"base": True, "limits": {"max_waiting": 0}},
    "free": {"base": True},
}


async def test_limits_over_the_wire(tmp_path: Path) -> None:
    """Each limit refuses with its code, its reason and when to come back, and other tenants are served meanwhile."""
    keys = make_keys(LIMITED)
    settings = settings_in(
        tmp_path, policy=keys.write(tmp_path / "policy.yaml"), audit_log=tmp_path / "a", max_running=4
    )
    async with running(App(settings, FakeEngine(token_interval_s=0.01))) as app:
        async with stubs_to(f"127.0.0.1:{app.port}") as stubs:
            await _refused_by_each(stubs, keys)
            await _full_queue(app, stubs, keys)
        text = app.metrics.text().decode()
    for limit in ("concurrent", "requests_per_s", "tokens_per_min"):
        assert f'limit="{limit}"' in text


async def _refused_by_each(stubs: Stubs, keys: Keys) -> None:
    def generate(tenant: str, request: Any = None) -> Any:
        return stubs.generation.Generate(request or ask("x", max_tokens=12), metadata=keys.header(tenant))

    answer = await generate("small", ask("x" * 40))
    assert answer.usage.completion_tokens == 20  # what is not asked for is what may be had
    for field, wrong in (("sampling.max_tokens", ask(max_tokens=21)), ("priority", ask(max_tokens=1))):
        if field == "priority":
            wrong.priority = 4
        refusal = await refused(generate("small", wrong))
        assert (refusal.code, list(refusal.violations)) == (Code.INVALID_ARGUMENT, [field])
    first = asyncio.ensure_future(generate("small"))
    await asyncio.sleep(0.03)
    over = [await refused(generate("small"))]
    await generate("slow")
    over.append(await refused(generate("slow")))
    await generate("thrifty", ask("x" * 30, max_tokens=12))
    over.append(await refused(generate("thrifty")))
    for refusal, least in zip(over, (0.5, 0.5, 5), strict=True):
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert refusal.quota
        assert (refusal.retry_s or 0) >= least
    assert (await generate("free")).usage.completion_tokens
    await first


async def test_tokens_of_an_answer_that_goes_on(tmp_path: Path) -> None:
    """What came of an answer before is read, and counts as the prompt does; only the debt may be greater, within bounds."""
    keys = make_keys(LIMITED)
    settings = settings_in(tmp_path, policy=keys.write(tmp_path / "policy.yaml"), audit_log=tmp_path / "a")
    request = ask("x" * 8)
    async with running(App(settings, FakeEngine())) as app, stubs_to(f"127.0.0.1:{app.port}") as stubs:

        def stream(tenant: str, asked: Any) -> Any:
            return all_of(stubs.generation.GenerateStream(asked, metadata=keys.header(tenant)))

        whole = await stream("free", ask_stream("x" * 8))
        rest = going_on(request, whole[:-2])
        assert len(rest.request.resume.token_ids) > 15
        assert await stream("thrifty", rest)  # with the prompt's 8 it is most of the minute's 30
        assert await stream("thrifty", rest)
        over = await refused(stubs.generation.Generate(ask("x"), metadata=keys.header("thrifty")))
        assert over.reason == "QUOTA_EXCEEDED"
        assert (over.retry_s or 0) > 15
        assert await stream("thrifty", rest)
        assert (await refused(stream("thrifty", rest))).reason == "QUOTA_EXCEEDED"


async def _full_queue(app: App, stubs: Stubs, keys: Keys) -> None:
    """A tenant that may not wait is refused when the engine is full; one without this limit waits."""
    long = ask_stream("x", max_tokens=60, ignore_eos=True)
    streams = [
        asyncio.ensure_future(all_of(stubs.generation.GenerateStream(long, metadata=keys.header("free"))))
        for _ in range(4)
    ]
    await until(lambda: app.admission.running == 4)
    short = ask("x", max_tokens=1)
    refusal = await refused(stubs.generation.Generate(short, metadata=keys.header("queueing")))
    assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert (await stubs.generation.Generate(short, metadata=keys.header("free"))).usage.completion_tokens == 1
    await asyncio.gather(*streams)
