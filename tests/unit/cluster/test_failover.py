"""No answer lost: whatever happens to a replica, the caller has every token once, of one version, in order."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client import AsyncClient
from engine.client.testing import write_adapter
from engine.errors import EngineDied
from tests.unit.cluster.conftest import Cluster, StartCluster
from tests.unit.server.conftest import Refusal, all_of, ask, ask_stream, refused, stubs_to, until
from tests.unit.server.test_resume import going_on

LONG = "a rather long prompt, so that the answer is long as well: größe 😀"
_SCHEMA = json.dumps(
    {"type": "object", "properties": {"name": {"type": "string", "minLength": 20}}, "required": ["name"]}
)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 1},
    "min_tokens": {"min_tokens": 100, "max_tokens": 120},
    "stop across the cut": {"stop": ["answer is lo", "never"]},
    "seed": {"temperature": 1.0, "seed": 4},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "structured": {"structured": pb.StructuredOutput(json_schema=_SCHEMA)},
    "prompt logprobs": {"prompt_logprobs": 1},
    "max_tokens": {"max_tokens": 30, "ignore_eos": True},
}


async def engine_dies(cluster: Cluster, number: int) -> None:
    """The engine process is gone; the server is there and starts another one."""
    cluster.engines[number].alive = False


async def server_dies(cluster: Cluster, number: int) -> None:
    """The whole replica is gone, in the middle of its connections."""
    server = cluster.apps[number]._server
    assert server
    await server.stop(None)


async def server_is_cut_off(cluster: Cluster, number: int) -> None:
    """The router alone finds that the replica does not answer any more."""
    cluster.router.fleet.links[cluster.addresses[number]].give_up()


DEATHS = [engine_dies, server_dies, server_is_cut_off]


async def disturbed(
    cluster: Cluster, request: pb.GenerateRequest, death: Any, *after: int, into: list[Any] | None = None
) -> list[Any]:
    """The messages of a stream whose replica fails after so many of them, again and again."""
    messages: list[Any] = [] if into is None else into
    async for message in cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)):
        messages.append(message)
        if len(messages) in after:
            await death(cluster, cluster.busy())
    return messages


def same(messages: list[Any], undisturbed: list[Any], failovers: int = 1) -> None:
    """They are the same stream but for timings and the count of failovers."""
    assert [message.sequence for message in messages] == list(range(len(undisturbed)))
    for one, other in zip(messages, undisturbed, strict=True):
        for part in ("text", "token_ids", "finish_reason", "logprobs", "prompt_logprobs", "adapter", "usage", "index"):
            assert getattr(one, part) == getattr(other, part), part
    assert messages[0].request_id
    assert not any(message.request_id for message in messages[1:])
    assert messages[-1].failovers == failovers
    assert messages[-1].timings.total.ToMilliseconds() > 0


@pytest.mark.slow
async def test_a_stream_goes_on(start: StartCluster) -> None:
    """Whatever was asked for, and wherever it is cut, the stream is the undisturbed one."""
    async with start(2, token_interval_s=0.001) as cluster:
        await cluster.publish("support")
        for number, sampling in enumerate(SAMPLINGS.values()):
            request = ask(LONG, "support", **({"max_tokens": 128} | sampling))
            whole = await all_of(cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)))
            cut = (1, len(whole) // 3, len(whole) // 2)[number % 3]
            same(await disturbed(cluster, request, server_is_cut_off, cut), whole)


@pytest.mark.parametrize("death", DEATHS)
async def test_a_stream_survives_any_death(start: StartCluster, death: Any) -> None:
    """The engine's death, the server's, and a broken connection."""
    async with start(2, token_interval_s=0.001) as cluster:
        await cluster.publish("support")
        request = ask(LONG, "support", logprobs=1)
        undisturbed = await all_of(cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)))
        same(await disturbed(cluster, request, death, 20), undisturbed)


async def test_a_stream_survives_several_deaths(start: StartCluster) -> None:
    """It goes on from one replica to the next, and back to one that has recovered."""
    async with start(2, token_interval_s=0.001) as cluster:
        await cluster.publish("support")
        request = ask(LONG, "support", max_tokens=128)
        undisturbed = await all_of(cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)))
        same(await disturbed(cluster, request, server_is_cut_off, 10, 30, 50), undisturbed, failovers=3)


@pytest.mark.parametrize("death", DEATHS)
async def test_unary_is_asked_elsewhere(start: StartCluster, death: Any) -> None:
    """A unary request whose replica fails is answered by the other one, which says that it took over."""
    async with start(
        2, token_interval_s=0.002, router={"poll_s": 60}
    ) as cluster:  # it must not look while one restarts
        call = cluster.stubs.generation.Generate(ask(LONG, max_tokens=128))
        await until(lambda: any(engine.running for engine in cluster.engines))
        await death(cluster, cluster.busy())
        answer = await call
        assert answer.completions[0].text == f"base heard: {LONG}"
        assert answer.failovers == (death is not engine_dies)  # that server has another engine at once


async def test_a_stream_that_fails_over_before_its_first_token_says_so(start: StartCluster) -> None:
    """Its last message has the count, as if it had failed later."""
    async with start(2, router={"poll_s": 60}) as cluster:
        await server_dies(cluster, 0)
        counts = []
        for number in range(20):  # the first one that belongs to the dead replica finds out
            messages = await all_of(cluster.stubs.generation.GenerateStream(ask_stream(f"{number}")))
            assert "".join(message.text for message in messages) == f"base heard: {number}"
            counts.append(messages[-1].failovers)
        assert sorted(counts) == [0] * 19 + [1]


async def test_openai_answers_say_that_they_failed_over(start: StartCluster) -> None:
    """A whole answer in a header, a stream in its last chunks, and the official client takes both; else nothing is said."""
    async with start(2, token_interval_s=0.003) as cluster:
        url = f"http://127.0.0.1:{cluster.router.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            given: dict[str, Any] = {"model": "base", "prompt": LONG, "max_tokens": 100, "temperature": 0}
            calm = await client.completions.with_raw_response.create(**given)
            assert "x-loraplex-failovers" not in calm.headers
            whole = asyncio.create_task(client.completions.with_raw_response.create(**given))
            await until(lambda: any(engine.running for engine in cluster.engines))
            await server_is_cut_off(cluster, cluster.busy())
            assert (await whole).headers["x-loraplex-failovers"] == "1"
            assert (await whole).parse().choices[0].text == calm.parse().choices[0].text
            chunks = []
            options = {"include_usage": True}
            async for chunk in await client.completions.create(**given, stream=True, stream_options=options):
                chunks.append(chunk.to_dict())
                if len(chunks) == 10:
                    await server_is_cut_off(cluster, cluster.busy())
            assert "".join(one["text"] for chunk in chunks for one in chunk["choices"]) == calm.parse().choices[0].text
            assert [chunk.get("failovers") for chunk in chunks] == [None] * (len(chunks) - 2) + [1, 1]


async def test_an_alias_that_moves_meanwhile_changes_nothing(start: StartCluster) -> None:
    """A stream that fails over after a promotion goes on with the version that began it."""
    async with start(2, token_interval_s=0.02) as cluster:
        await cluster.publish("support", 1)
        await cluster.publish("support", 2)
        messages: list[Any] = []
        call = cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=ask(LONG, "support")))
        async for message in call:
            messages.append(message)
            if len(messages) == 5:
                await cluster.client.adapters.promote("support", "v2")
                await server_is_cut_off(cluster, cluster.busy())
        assert "".join(message.text for message in messages) == f"support@v1 heard: {LONG}"
        assert messages[-1].failovers == 1


async def test_several_answers_end_with_a_clear_status(start: StartCluster) -> None:
    """Streams of n answers cannot go on: they say so, and how many tokens came."""
    async with start(2, token_interval_s=0.001) as cluster:
        request = ask(LONG, n=2, temperature=1.0)
        refusal: Refusal = await refused(disturbed(cluster, request, server_is_cut_off, 9))
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "STREAM_LOST")
        assert int(refusal.metadata["tokens_sent"]) >= 9


async def test_the_last_replica_dies(start: StartCluster) -> None:
    """With nobody to go on, the stream ends UNAVAILABLE and says how many tokens came; later requests are refused."""
    async with start(1, token_interval_s=0.001, router={"give_up_s": 0.3}) as cluster:
        came: list[Any] = []
        refusal = await refused(disturbed(cluster, ask(LONG), server_dies, 9, into=came))
        told = (refusal.code.name, refusal.reason, refusal.metadata["tokens_sent"])
        assert told == ("UNAVAILABLE", "STREAM_LOST", str(sum(len(message.token_ids) for message in came)))
        assert len(came) >= 9  # one or two may have been on their way when it died
        refusal = await refused(cluster.stubs.generation.Generate(ask()))
        assert (refusal.reason, refusal.retry_s) == ("NO_REPLICA", 5.0)


@pytest.mark.parametrize("other", ["full", "dead"])
async def test_nobody_can_go_on(start: StartCluster, other: str) -> None:
    """The other replica stays full, or its engine dead: the stream says how many tokens came in all."""
    given = {"token_interval_s": 0.01, "max_running": 1, "max_waiting": 0, "max_restarts": 0}
    async with start(2, **given, router={"give_up_s": 0.3}) as cluster, stubs_to(cluster.addresses[1]) as direct:
        if other == "full":
            direct.generation.Generate(ask("x", max_tokens=1500, ignore_eos=True))
            await until(lambda: bool(cluster.engines[1].running))
        came: list[Any] = []
        request = ask(LONG, max_tokens=1500, ignore_eos=True)
        task = asyncio.create_task(disturbed(cluster, request, server_dies, 5, into=came))
        if other == "dead":
            await until(lambda: len(came) > 20)
            await engine_dies(cluster, cluster.busy())
        refusal = await refused(task)
        told = (refusal.code.name, refusal.reason, refusal.metadata["tokens_sent"])
        assert told == ("UNAVAILABLE", "STREAM_LOST", str(sum(len(message.token_ids) for message in came)))


async def test_a_replica_that_lies_about_its_health(start: StartCluster) -> None:
    """One that says it is well and fails every request is left alone after a few, and no caller hears of it."""
    async with start(2) as cluster:
        liar = cluster.engines[0]

        async def fail(*_: Any) -> None:
            raise EngineDied

        liar.encode = fail  # type: ignore[assignment, method-assign]
        asked = 0
        for number in range(30):
            answer = await cluster.stubs.generation.Generate(ask(f"{number}"))
            assert answer.completions[0].text == f"base heard: {number}"
            asked += answer.failovers
        assert 1 <= asked <= 4
        page = cluster.router.metrics.text().decode()
        assert f'loraplex_router_failovers_total{{when="before the first token"}} {asked}.0' in page
        assert f'loraplex_router_replica_sent{{replica="{cluster.addresses[1]}"}} 0.0' in page


async def test_a_caller_that_leaves_frees_the_replica(start: StartCluster) -> None:
    """Cancelling a stream or a unary call at the router ends it in the engine, and is no failure of the replica."""
    async with start(2, token_interval_s=0.005) as cluster:
        stream = cluster.stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=ask(LONG)))
        await anext(aiter(stream))
        unary = cluster.stubs.generation.Generate(ask(LONG))
        await until(lambda: sum(len(engine.running) for engine in cluster.engines) == 2)
        stream.cancel()
        unary.cancel()
        await until(lambda: not any(engine.running for engine in cluster.engines))
        assert len(cluster.router.fleet.usable()) == 2
        assert all(not replica.sent for replica in cluster.router.fleet.replicas)


async def test_two_bases(start: StartCluster) -> None:
    """During a change of base each version is answered by a replica of its own base; without one it is UNAVAILABLE."""
    async with start(2, models=("old", "new")) as cluster:
        for number, name in enumerate(("elder", "younger")):
            write_adapter(cluster.folder / name, number)
            async with AsyncClient(cluster.addresses[number]) as direct:
                await direct.adapters.publish(cluster.folder / name, name)
        bases = set()
        for name in ("elder", "younger") * 3:
            answer = await cluster.stubs.generation.Generate(ask("x", name))
            assert answer.completions[0].text == f"{name}@v1 heard: x"
            bases.add((name, answer.adapter.base_fingerprint))
        assert len(bases) == 2
        assert len({base for _, base in bases}) == 2
        await server_dies(cluster, 1)
        await cluster.look(1)
        assert (await cluster.client.generate(adapter="elder", prompt="x", temperature=0)).text == "elder@v1 heard: x"
        refusal = await refused(cluster.stubs.generation.Generate(ask("x", "younger")))
        assert (refusal.code.name, refusal.reason, refusal.retry_s) == ("UNAVAILABLE", "NO_REPLICA", 5.0)
        assert dict(bases)["younger"] in refusal.message


async def test_two_bases_of_one_adapter(start: StartCluster) -> None:
    """What one alias needs says nothing about another; what is remembered of a base that left is asked anew."""
    async with start(2, models=("old", "new")) as cluster:
        for number in range(2):
            write_adapter(cluster.folder / f"v{number}", number)
            async with AsyncClient(cluster.addresses[number]) as direct:
                await direct.adapters.publish(cluster.folder / f"v{number}", "support")
                if number:
                    await direct.adapters.promote("support", "v2", alias="next")
        for name, version in (("support@next", "v2"), ("support", "v1"), ("support@next", "v2")):
            answer = await cluster.client.generate(adapter=name, prompt="x", temperature=0)
            assert answer.text == f"support@{version} heard: x"
        cluster.router.fleet.learn_base(
            "support", cluster.router.fleet.base_of("support@next")
        )  # as if it had moved back
        await server_dies(cluster, 1)
        await cluster.look(1)
        answer = await cluster.client.generate(adapter="support", prompt="x", temperature=0)
        assert answer.text == "support@v1 heard: x"
        refusal = await refused(cluster.stubs.generation.Generate(ask("x", "support@next")))
        assert refusal.reason == "NO_REPLICA"


async def test_an_answer_that_its_caller_goes_on_with(start: StartCluster) -> None:
    """It goes to the base that began it, and waits for that one; if the base has left for good, the others refuse it."""
    async with start(2, models=("old", "new")) as cluster:
        begun = []
        for address in cluster.addresses:
            async with stubs_to(address) as direct:
                begun.append(await all_of(direct.generation.GenerateStream(ask_stream(LONG))))
        for whole in begun:
            answer = await cluster.stubs.generation.Generate(going_on(ask(LONG), whole[:10]).request)
            assert answer.completions[0].text == "".join(message.text for message in whole[10:])
            rest = await all_of(cluster.stubs.generation.GenerateStream(going_on(ask(LONG), whole[:10])))
            assert [message.text for message in rest] == [message.text for message in whole[10:]]
        cluster.apps[1].admission.drain()
        await cluster.look(1)
        call = cluster.stubs.generation.Generate(going_on(ask(LONG), begun[1][:10]).request)
        await asyncio.sleep(0.3)
        assert not call.done()
        cluster.apps[1].admission.draining = False
        assert (await call).completions[0].text == "".join(message.text for message in begun[1][10:])
        unknown = going_on(ask(LONG), begun[1][:10]).request
        unknown.resume.base_fingerprint = "sha256:other"
        assert (await refused(cluster.stubs.generation.Generate(unknown))).reason == "OTHER_VERSION"
