"""The generator: a request's way through name, prompt, place and adapter to its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import AdapterNotFound, InvalidRequest, Overloaded
from engine.registry.names import AdapterRef
from engine.runtime.allowance import Allowance
from engine.runtime.engine import Delta, EngineRequest, Sampling
from engine.runtime.fake import FakeEngine
from engine.runtime.requests import GenerationRequest, Prompt
from tests.unit.runtime.conftest import CountingEngine, World, text_of, until


def ask(text: str = "hi", adapter: str = "", priority: int = 0, **sampling: Any) -> GenerationRequest:
    """A greedy request."""
    ref = AdapterRef.parse(adapter) if adapter else None
    return GenerationRequest(Prompt(text=text), Sampling(**({"temperature": 0} | sampling)), ref, priority)


async def test_base_and_adapter(world: World) -> None:
    """No adapter: the base answers; a bare name: its current version."""
    await world.publish("support")
    generator = world.generator()
    assert await text_of(generator, ask()) == "base heard: hi"
    assert await text_of(generator, ask(adapter="support")) == "support@v1 heard: hi"


async def test_what_is_known_at_once(world: World) -> None:
    """Who answers and how long the prompt is are known before the first token; the sums after the last."""
    manifest = await world.publish("support")
    async with world.generator().answer(ask(adapter="support", n=2, temperature=1.0)) as (answer, deltas):
        assert answer.manifest == manifest
        assert (answer.prompt_tokens, answer.answers, answer.completion_tokens) == (2, 2, 0)
        tokens = [token async for delta in deltas for token in delta.token_ids]
    assert answer.completion_tokens == len(tokens)
    assert 0 < answer.queue_s < answer.first_token_s <= answer.total_s
    assert answer.adapter_wait_s > 0


async def test_unknown_adapter(world: World) -> None:
    """An unknown name is refused before a place is taken, with the nearest."""
    await world.publish("support")
    with pytest.raises(AdapterNotFound) as refusal:
        await text_of(world.generator(), ask(adapter="suport"))
    assert refusal.value.nearest == ["support"]


async def test_alias_moves_in_flight(world: World, engine: CountingEngine) -> None:
    """A request keeps the version that it was resolved to; the next one gets the new one."""
    await world.publish("support")
    await world.publish("support")
    generator = world.generator()
    async with generator.answer(ask(adapter="support")) as (answer, deltas):
        first = await anext(aiter(deltas))
        await world.registry.set_alias("support", "current", "v2")
        await world.catalog.refresh()
        assert await text_of(generator, ask(adapter="support")) == "support@v2 heard: hi"
        rest = [delta.text async for delta in deltas]
    assert first.text + "".join(rest) == "support@v1 heard: hi"
    assert answer.manifest is not None
    assert answer.manifest.version == "v1"


@pytest.mark.parametrize("length", [15, 16, 17])
async def test_prompt_without_room_for_an_answer(world: World, length: int) -> None:
    """Prompt and at least one token must fit the context."""
    world.engine = FakeEngine(context_length=16)
    request = ask("x" * length, max_tokens=1)
    if length == 15:
        assert len(await text_of(world.generator(), request)) == 1
        return
    with pytest.raises(InvalidRequest, match="context length is 16") as refusal:
        await text_of(world.generator(), request)
    assert refusal.value.violations[0][0] == "prompt"


async def test_max_tokens_over_the_context(world: World) -> None:
    """An explicit max_tokens that does not fit is refused, saying how many would."""
    world.engine = FakeEngine(context_length=64)
    with pytest.raises(InvalidRequest, match="at most 62 fit") as refusal:
        await text_of(world.generator(), ask(max_tokens=63))
    assert refusal.value.violations[0][0] == "sampling.max_tokens"
    assert await text_of(world.generator(), ask(max_tokens=62))


@pytest.mark.parametrize(("context", "expected"), [(64, 62), (130, 128), (2048, 128)])
async def test_default_max_tokens(world: World, context: int, expected: int) -> None:
    """Left out, max_tokens is 128 or as much as fits."""
    world.engine = FakeEngine(context_length=context)
    async with world.generator().answer(ask(ignore_eos=True)) as (answer, deltas):
        [_ async for _ in deltas]
    assert answer.completion_tokens == expected


async def test_min_tokens_over_the_context(world: World) -> None:
    """A minimum that cannot fit is refused too."""
    world.engine = FakeEngine(context_length=64)
    with pytest.raises(InvalidRequest):
        await text_of(world.generator(), ask(min_tokens=63))


async def test_unknown_token_ids(world: World) -> None:
    """Token ids beyond the vocabulary never reach the engine."""
    request = GenerationRequest(Prompt(token_ids=(1, 257)), Sampling(temperature=0))
    with pytest.raises(InvalidRequest, match="token id 257"):
        await text_of(world.generator(), request)


async def test_chat(world: World) -> None:
    """A conversation is rendered by the engine's template."""
    request = GenerationRequest(Prompt(chat=[("user", "hi")]), Sampling(temperature=0))
    assert await text_of(world.generator(), request) == "base heard: user: hi\nassistant:"


async def test_leaving_frees_everything(world: World, engine: CountingEngine) -> None:
    """Who leaves after the first token leaves nothing behind: no request, no place, no lease."""
    await world.publish("support")
    generator = world.generator()
    async with generator.answer(ask(adapter="support")) as (_, deltas):
        await anext(aiter(deltas))
        assert engine.running
        assert generator.residency.residents()[0].in_use == 1
    assert not engine.running
    assert generator.admission.running == 0
    assert generator.residency.residents()[0].in_use == 0


async def test_cancelled_while_waiting_for_the_adapter(world: World, engine: CountingEngine) -> None:
    """Who is cancelled during the load gives the place back at once."""
    await world.publish("support")
    generator = world.generator(max_running=1)
    engine.may_load.clear()
    task = asyncio.create_task(text_of(generator, ask(adapter="support")))
    await until(lambda: engine.loads)
    assert generator.admission.running == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert generator.admission.running == 0
    engine.may_load.set()
    assert await text_of(generator, ask(adapter="support")) == "support@v1 heard: hi"


class DyingOnce(FakeEngine):
    """Its first answer comes to an end in the middle, and then again from its beginning."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Begin, die, begin again."""
        async with aclosing(super().generate(request)) as deltas:
            for _ in range(3):
                yield await anext(deltas)
        assert request.on_restart
        request.on_restart()
        async with aclosing(super().generate(request)) as deltas:
            async for delta in deltas:
                yield delta


@pytest.mark.parametrize("engine_type", [FakeEngine, DyingOnce])
async def test_an_answer_that_begins_again_is_paid_for_once(world: World, engine_type: type[FakeEngine]) -> None:
    """A tenant pays for the prompt and the answer that it gets, not for what was lost with an engine."""
    world.engine = engine_type()
    spent: list[int] = []

    class Purse(Allowance):
        def spend(self, tokens: int) -> None:
            spent.append(tokens)

    generator = world.generator(allowances=lambda _: Purse())
    async with generator.answer(replace(ask(), on_restart=lambda: None)) as (answer, deltas):
        assert [delta async for delta in deltas]
    assert sum(spent) == answer.prompt_tokens + answer.completion_tokens


async def test_full(world: World, engine: CountingEngine) -> None:
    """A request beyond places and queue is refused, and the others are answered."""
    engine.token_interval_s = 0.002
    generator = world.generator(max_running=1, max_waiting=1)
    answers = [asyncio.create_task(text_of(generator, ask())) for _ in range(3)]
    results = await asyncio.gather(*answers, return_exceptions=True)
    assert sum(isinstance(result, Overloaded) for result in results) == 1
    assert results.count("base heard: hi") == 2


async def test_n_answers_take_n_places(world: World, engine: CountingEngine) -> None:
    """A request for several answers counts as several."""
    generator = world.generator(max_running=4)
    async with generator.answer(ask(n=3, temperature=1.0)) as (_, deltas):
        await anext(aiter(deltas))
        assert generator.admission.running == 3


async def test_request_ids_are_unique(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine never sees one id twice, whatever the callers call their requests."""
    seen: list[str] = []
    generate = world.engine.generate

    def spy(request: Any) -> Any:
        seen.append(request.id)
        return generate(request)

    monkeypatch.setattr(world.engine, "generate", spy)
    generator = world.generator(max_running=50)
    await asyncio.gather(*(text_of(generator, ask()) for _ in range(50)))
    assert len(set(seen)) == 50
