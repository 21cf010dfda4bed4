"""Versions change a hundred times under load: no request fails, and each answer is of the version that it names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import pytest_asyncio

from engine.client import AsyncClient, Generation
from engine.server.app import App
from tests.e2e.conftest import ADAPTERS, heldout

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
]

NAME = "swap"
PROMPTS = [heldout(ref, 4)[3][0] for ref in ("support@v1", "legal@v1", "code@v1")]
Tokens = dict[tuple[str, str], tuple[int, ...]]


async def asked(client: AsyncClient, adapter: str, prompt: str, key: str = "") -> Generation:
    """Eight greedy tokens."""
    return await client.generate(
        adapter=adapter, prompt=prompt, temperature=0, max_tokens=8, ignore_eos=True, routing_key=key
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def right(client: AsyncClient) -> Tokens:
    """What three versions of one adapter answer to each prompt when nobody changes anything: no two of them the same."""
    for ref in ("support@v1", "legal@v1", "code@v1"):
        await client.adapters.publish(ADAPTERS[ref], NAME)
    found: Tokens = {}
    for version in ("v1", "v2", "v3"):
        for prompt in PROMPTS:
            found[version, prompt] = (await asked(client, f"{NAME}@{version}", prompt)).token_ids
    assert len({tuple(found[version, prompt] for prompt in PROMPTS) for version in ("v1", "v2", "v3")}) == 3
    return found


async def test_a_hundred_changes_under_load(app: App, client: AsyncClient, right: Tokens) -> None:
    """Canaries begin, grow, are promoted, rolled back and ended, a shadow of everything all the while."""
    stop = asyncio.Event()
    answered: Counter[str] = Counter()
    wrong: list[str] = []

    async def ask(number: int) -> None:
        while not stop.is_set():
            prompt = PROMPTS[(number + answered.total()) % len(PROMPTS)]
            answer = await asked(client, NAME, prompt, f"caller-{number}")
            version = answer.adapter.version
            answered[version] += 1
            if answer.token_ids != right[version, prompt]:
                wrong.append(f"{version}: {answer.token_ids}, not {right[version, prompt]}")

    steps: list[Callable[[], Awaitable[object]]] = [
        lambda: client.adapters.set_shadow(NAME, 1.0, "v3"),
        lambda: client.adapters.set_canary(NAME, 0.3, "v2"),
        lambda: client.adapters.set_canary(NAME, 0.8),
        lambda: client.adapters.promote(NAME, "v2", expected_version="v1"),
        lambda: client.adapters.rollback(NAME),
        lambda: client.adapters.set_shadow(NAME, 0.5, "v2"),
        lambda: client.adapters.set_canary(NAME, 0.5, "v3"),
        lambda: client.adapters.end_canary(NAME),
        lambda: client.adapters.promote(NAME, "v3"),
        lambda: client.adapters.promote(NAME, "v1"),
    ]
    promoted = {3: "v2", 8: "v3"}  # by which step
    callers = [asyncio.create_task(ask(number)) for number in range(6)]
    before = len((await client.adapters.get(NAME)).history)
    try:
        for number, step in enumerate(steps * 10):
            await step()
            await asyncio.sleep(0.02)
            while number in promoted and not answered[promoted[number]]:  # a busy machine answers late
                await asyncio.sleep(0.02)
    finally:
        stop.set()
    await asyncio.gather(*callers)  # raises what any request failed with
    assert not wrong
    assert set(answered) == {"v1", "v2", "v3"}
    assert len((await client.adapters.get(NAME)).history) == before + 100
    assert app.generator
    assert not app.generator.residency.quarantined


async def test_a_shadow_is_compared_on_the_real_engine(app: App, client: AsyncClient, right: Tokens) -> None:
    """Its share of equal answers is what the two versions' own answers say, token by token."""
    await client.adapters.set_shadow(NAME, 1.0, "v3")
    for prompt in PROMPTS:
        await asked(client, NAME, prompt)
        async with asyncio.timeout(20):
            while app._spare._guests:
                await asyncio.sleep(0.02)
    report = await client.adapters.shadow_report(NAME)
    await client.adapters.end_shadow(NAME)
    equal = sum(right["v1", prompt] == right["v3", prompt] for prompt in PROMPTS)
    assert (report.compared, report.equal) == (len(PROMPTS), equal)
    assert not report.failed
    assert report.shadow_times.time_to_first_token.p50.ToTimedelta().total_seconds() > 0
