"""A request that kills whoever answers it: few die of it, and nobody else hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from unittest.mock import MagicMock

import pytest

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.errors import EngineDied
from engine.runtime.engine import Delta, EngineRequest
from engine.runtime.fake import FakeEngine
from tests.unit.cluster.conftest import StartCluster
from tests.unit.cluster.test_failover import LONG, server_dies
from tests.unit.server.conftest import all_of, ask, ask_stream, refused, until


def poisoned(engine: FakeEngine, killed: list[FakeEngine], position: int) -> None:
    """Have an engine die of prompts that begin with "poison", when it would say the token after `position`."""
    generate, start = engine.generate, engine.start

    async def dies(request: EngineRequest) -> AsyncGenerator[Delta, None]:
        poison = bytes(request.prompt_token_ids).startswith(b"poison")
        said = len(request.resume.token_ids) if request.resume else 0
        async with aclosing(generate(request)) as deltas:
            async for delta in deltas:
                if poison and said == position:
                    engine.alive = False
                    killed.append(engine)
                    raise EngineDied
                said += len(delta.token_ids)
                yield delta

    async def slow() -> None:
        await asyncio.sleep(0.5)
        await start()

    engine.generate, engine.start = dies, slow  # type: ignore[method-assign]


@pytest.mark.parametrize(("stream", "position"), [(False, 0), (True, 0), (True, 2)])
async def test_a_request_that_kills_engines_kills_two(start: StartCluster, *, stream: bool, position: int) -> None:
    """It ends with a clear error, whatever it is asked by; whoever else was there, or comes, gets a whole answer."""
    async with start(4, token_interval_s=0.01, router={"give_up_s": 5}) as cluster:
        killed: list[FakeEngine] = []
        prompts = [f"{number}: {LONG}" for number in range(12)]
        others = [
            asyncio.create_task(all_of(cluster.stubs.generation.GenerateStream(ask_stream(one)))) for one in prompts
        ]
        await until(lambda: sum(len(engine.running) for engine in cluster.engines) == len(others))
        await asyncio.sleep(0.1)  # all of them have some tokens
        for engine in cluster.engines:
            poisoned(engine, killed, position)
        poison = ask("poison", ignore_eos=True)
        calls = cluster.stubs.generation
        refusal = await refused(
            all_of(calls.GenerateStream(pb.GenerateStreamRequest(request=poison))) if stream else calls.Generate(poison)
        )
        said = (refusal.code.name, refusal.reason, refusal.metadata["tokens_sent"])
        assert said == ("UNAVAILABLE", "STREAM_LOST" if position else "ENGINE_DIED", str(position))
        assert "2 replicas died" in refusal.message
        assert refusal.retry_s == (1 if position else 30)
        assert len(set(map(id, killed))) == 2
        for prompt, messages in zip(prompts, await asyncio.gather(*others), strict=True):
            assert "".join(message.text for message in messages) == f"base heard: {prompt}"
        assert (await calls.Generate(ask("x"))).completions[0].text == "base heard: x"


async def test_replicas_that_were_dead_already_did_not_die_of_a_request(start: StartCluster) -> None:
    """A request that finds three of four gone, before the router has noticed, is answered by the fourth."""
    async with start(4, router={"poll_s": 60}) as cluster:
        for number in range(3):
            await server_dies(cluster, number)
        for number in range(8):
            answer = await cluster.stubs.generation.Generate(ask(f"{number}"))
            assert answer.completions[0].text == f"base heard: {number}"


async def test_a_request_that_fails_everywhere_takes_nobody_along(start: StartCluster) -> None:
    """Whoever fails on every replica may be the reason itself: most of the fleet stays."""
    async with start(4, router={"give_up_s": 0.5}) as cluster:
        for app in cluster.apps:
            assert app.generator
            app.generator.engine.generate = MagicMock(side_effect=EngineDied)
        refusal = await refused(cluster.stubs.generation.Generate(ask("x")))
        assert refusal.code.name == "UNAVAILABLE"
        assert len(cluster.router.fleet.usable()) >= 2
