"""Messages that a busy router puts together say what they said one by one: every token once, in order, of the same answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.cluster.router.together import Pace, together
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import all_of, ask


def stream(count: int, answers: int = 1, seed: int = 0) -> list[pb.GenerateStreamResponse]:
    """So many messages of so many answers that are told in turns, with all that a message may hold."""
    dice = random.Random(seed)
    made = []
    for number in range(count):
        ids = [dice.randrange(1000) for _ in range(dice.randrange(3))]
        logprobs = [pb.TokenLogprobs(token=pb.TokenLogprob(token_id=token, logprob=-1)) for token in ids]
        index = dice.randrange(answers)
        made.append(
            pb.GenerateStreamResponse(
                sequence=number, index=index, text=f"<{number}>", token_ids=ids, logprobs=logprobs
            )
        )
    made[0].adapter.name, made[0].request_id = "support", "r1"
    made[-1].finish_reason = pb.FINISH_REASON_LENGTH
    made[-1].usage.completion_tokens = 7
    return made


def pace(apart_s: float) -> Pace:
    """So much time between messages."""
    made = Pace()
    made.apart_s = apart_s
    return made


async def told(messages: list[pb.GenerateStreamResponse], pauses: frozenset[int]) -> AsyncGenerator[bytes, None]:
    """These messages, with some time before the ones of these numbers."""
    for number, message in enumerate(messages):
        if number in pauses:
            await asyncio.sleep(0.001)
        yield message.SerializeToString()


def content(messages: list[pb.GenerateStreamResponse]) -> dict[int, tuple[str, list[int], int]]:
    """By answer: its text, tokens, and count of log probabilities."""
    found: dict[int, tuple[str, list[int], int]] = {}
    for one in messages:
        text, ids, logprobs = found.get(one.index, ("", [], 0))
        found[one.index] = (text + one.text, [*ids, *one.token_ids], logprobs + len(one.logprobs))
    return found


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("seed", range(10))
async def test_nothing_is_lost_and_nothing_comes_twice(seed: int, answers: int) -> None:
    """However messages come, and however slowly they are taken."""
    dice = random.Random(seed)
    messages = stream(dice.randrange(1, 200), answers, seed)
    pauses = frozenset(number for number in range(len(messages)) if dice.random() < 0.2)
    came = []
    async for data in together(told(messages, pauses), pace(0.005)):
        came.append(pb.GenerateStreamResponse.FromString(data))
        if dice.random() < 0.3:
            await asyncio.sleep(0.002)
    assert content(came) == content(messages)
    assert [one.sequence for one in came] == list(range(len(came)))
    assert (came[0].adapter, came[0].request_id) == (messages[0].adapter, "r1")
    assert (came[-1].finish_reason, came[-1].usage) == (messages[-1].finish_reason, messages[-1].usage)
    assert not any(one.HasField("usage") for one in came[:-1])
    assert len(came) < len(messages) or len(messages) < 20
    assert len({one.index for one in messages}) > 1 or len(came) < 2 + len(messages) / 3 or len(messages) < 20


async def test_who_keeps_up_passes_bytes_as_they_came() -> None:
    """Nothing is read, and nothing is changed."""
    messages = stream(20)
    came = [data async for data in together(told(messages, frozenset()), pace(0))]
    assert came == [message.SerializeToString() for message in messages]


async def test_what_is_said_first_is_passed_on_at_once() -> None:
    """However busy the router is: it is the time to first token."""
    messages = together(told(stream(20), frozenset()), pace(30))
    first = await asyncio.wait_for(anext(messages), 1)
    assert pb.GenerateStreamResponse.FromString(first).request_id == "r1"
    await messages.aclose()


def test_the_pace_follows_how_busy_the_process_is() -> None:
    """None at first; more with each look at a busy process, up to a bound; none again when it is idle."""
    now = used = 0.0
    made = Pace(lambda: now, lambda: used)
    seen = []
    for busy in (0.5, 0.9, 1.0, 1.2, 1.0, 1.0, 1.0, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        now, used = now + 0.1, used + 0.1 * busy
        made.look()
        seen.append(made.apart_s)
    assert seen[:3] == [0, 0.001, 0.002]
    assert max(seen) == seen[6] == seen[7] == 0.02
    assert seen[-1] == 0


async def test_a_paced_stream_goes_on_elsewhere(start: StartCluster) -> None:
    """What waits to be passed on when a replica dies is passed on, and the rest follows with the next number."""
    async with start(2, token_interval_s=0.001) as cluster:
        request = pb.GenerateStreamRequest(request=ask("a long prompt " * 8, max_tokens=120, logprobs=1))
        whole = await all_of(cluster.stubs.generation.GenerateStream(request))
        cluster.router.pace.apart_s = 0.02
        came = []
        async for message in cluster.stubs.generation.GenerateStream(request):
            came.append(message)
            if len(came) == 2:
                cluster.engines[cluster.busy()].alive = False
    assert content(came) == content(whole)
    assert [one.sequence for one in came] == list(range(len(came)))
    assert len(came) < len(whole) / 2
    assert came[-1].failovers == 1
    assert came[-1].usage == whole[-1].usage


async def test_an_error_comes_after_what_came_before_it() -> None:
    """The caller has every token that was made."""

    async def breaks() -> AsyncGenerator[bytes, None]:
        async for data in told(stream(9), frozenset()):
            yield data
        raise RuntimeError("broken")

    came: list[pb.GenerateStreamResponse] = []

    async def take() -> None:
        async for data in together(breaks(), pace(0.005)):
            came.append(pb.GenerateStreamResponse.FromString(data))  # noqa: PERF401 - what came counts, though it breaks

    with pytest.raises(RuntimeError, match="broken"):
        await take()
    assert content(came) == content(stream(9))


async def test_a_caller_leaves_while_the_replica_computes() -> None:
    """What waits for the next token is ended."""
    closed = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        try:
            for number in range(3):
                yield pb.GenerateStreamResponse(sequence=number, token_ids=[1]).SerializeToString()
            await asyncio.sleep(60)
        finally:
            closed.set()

    messages = together(slow(), pace(0.001))
    came = [await anext(messages)]
    while sum(len(pb.GenerateStreamResponse.FromString(data).token_ids) for data in came) < 3:
        came.append(await anext(messages))
    await asyncio.sleep(0.01)
    await messages.aclose()
    assert closed.is_set()


async def test_a_slow_caller_makes_the_replica_wait_and_one_who_leaves_ends_it() -> None:
    """No more than some messages are kept; the source is closed with the stream."""
    made, closed = 0, asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal made
        try:
            while True:
                made += 1
                yield pb.GenerateStreamResponse(sequence=made - 1, token_ids=[1]).SerializeToString()
                await asyncio.sleep(0)
        finally:
            closed.set()

    messages = together(endless(), pace(0.005))
    await anext(messages)
    await anext(messages)
    await asyncio.sleep(0.05)
    before = made
    await asyncio.sleep(0.05)
    assert 1 < made == before < 200
    await messages.aclose()
    assert closed.is_set()
