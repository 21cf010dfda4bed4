"""Who is being served: GetActivity and the metrics by adapter agree with what was asked, and stay bounded."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import engine_pb2
from engine.client.testing import fake_server
from engine.runtime.requests import Answer, Ending
from engine.server.activity import Activity
from engine.server.metrics import Metrics
from tests.unit.server.conftest import Stubs, all_of, ask, endless, engine_of, refused, stubs_to, until


async def activity(stubs: Stubs) -> engine_pb2.GetActivityResponse:
    """What the server says."""
    return await stubs.engine.GetActivity(engine_pb2.GetActivityRequest())


def tenant(name: str) -> tuple[tuple[str, str], ...]:
    """A call's metadata."""
    return (("x-loraplex-tenant", name),)


async def test_it_counts_by_version_and_tenant() -> None:
    """Waiting, running and ended requests, tokens of unfinished answers too, service by tenant, and what happened."""
    with fake_server(max_running=1, tenant_weights="gold=4") as server:
        await asyncio.to_thread(server.publish, "support")
        async with stubs_to(server.target) as stubs:
            before = await activity(stubs)
            answer = await stubs.generation.Generate(ask(adapter="support"), metadata=tenant("gold"))
            engine_of(server).token_interval_s = 0.01
            running = stubs.generation.Generate(endless(), metadata=tenant("batch"))
            await until(lambda: engine_of(server).running)
            waiting = stubs.generation.Generate(ask(adapter="support"), metadata=tenant("gold"))
            await until(lambda: server.app.admission.waiting)
            await asyncio.sleep(0.1)
            now = await activity(stubs)
            running.cancel()
            waiting.cancel()
        assert now.ready
        assert now.uptime.ToTimedelta() > before.uptime.ToTimedelta()
        versions = {(one.name, one.version): one for one in now.adapters}
        support, base = versions["support", "v1"], versions["", ""]
        assert (support.requests, support.failed, support.waiting, support.running) == (1, 0, 1, 0)
        assert support.generated_tokens == answer.usage.completion_tokens
        assert support.ttft_p50.ToTimedelta() >= support.queue_p50.ToTimedelta()
        assert (base.requests, base.running) == (0, 1)
        assert base.generated_tokens > 0
        assert now.generated_tokens >= support.generated_tokens + base.generated_tokens
        tenants = {one.name: one for one in now.tenants}
        service = answer.usage.prompt_tokens + 2 * answer.usage.completion_tokens
        assert (tenants["gold"].service, tenants["gold"].weight, tenants["gold"].waiting) == (service, 4.0, 1)
        assert (tenants["batch"].running, tenants["batch"].weight) == (1, 1.0)
        assert [event.kind for event in now.events] == ["published", "alias", "loaded"]


def test_it_forgets_whoever_was_quiet_longest() -> None:
    """However many tenants callers invent, a bounded number is remembered: the latest."""
    heard = Activity({})
    for number in range(1000):
        answer = Answer(None, 1, 1, 0.0, f"t{number}")
        heard.began(answer)
        heard.ended(answer, Ending())
    found = heard.snapshot(ready=True)
    assert len(found.tenants) == 200
    assert {one.name for one in found.tenants} == {f"t{number}" for number in range(800, 1000)}


async def test_metrics_by_adapter() -> None:
    """Requests by status, tokens, hits, loads, evictions and quarantines are counted under the adapter's name."""
    with fake_server(max_resident=1) as server:
        for name in ("support", "legal"):
            await asyncio.to_thread(server.publish, name)
        async with stubs_to(server.target) as stubs:
            for name in ("support", "support", "legal", "support", ""):
                await stubs.generation.Generate(ask(adapter=name), metadata=tenant("gold"))
            engine_of(server).not_finite.add("support@v1")
            await refused(stubs.generation.Generate(ask(adapter="support")))
            await all_of(stubs.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter="legal")))
        lines = dict(line.rsplit(" ", 1) for line in server.app.metrics.text().decode().splitlines() if line[0] != "#")
    expected = {
        'requests_total{adapter="support",code="OK"}': 3,
        'requests_total{adapter="support",code="FAILED_PRECONDITION"}': 1,
        'requests_total{adapter="base",code="OK"}': 1,
        'hits_total{adapter="support",hit="yes"}': 2,
        'hits_total{adapter="support",hit="no"}': 2,
        'load_wait_seconds_count{adapter="support"}': 2,
        'queue_seconds_count{adapter="legal"}': 1,
        'ttft_seconds_count{adapter="legal"}': 1,
        'loaded_seconds_count{adapter="support"}': 2,
        'left_total{adapter="support",why="evicted"}': 2,
        'left_total{adapter="support",why="quarantined"}': 1,
        "slots": 1,
    }
    assert {key: float(lines[f"loraplex_adapter_{key}"]) for key in expected} == expected
    assert float(lines['loraplex_tenant_service_total{tenant="gold"}']) > 0


def test_metrics_stay_bounded() -> None:
    """A thousand adapters make twenty labels and "other"."""
    metrics = Metrics()
    for number in itertools.chain(range(1000), range(1000)):
        manifest: Any = type("Manifest", (), {"name": f"a{number}"})
        metrics.ended(Answer(manifest, 1, 1, 0.0, admitted=True), Ending())
    labels = {
        line.split('adapter="')[1].split('"')[0]
        for line in metrics.text().decode().splitlines()
        if line.startswith("loraplex_adapter_requests_total{")
    }
    assert len(labels) <= 21
    assert "other" in labels
