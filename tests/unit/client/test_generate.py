"""Generate, CountTokens and GetEngine: keywords to messages, messages to results, retries and deadlines."""

# ruff: noqa: N802 - servicers have the names of the proto's methods

from __future__ import annotations

import asyncio
import dataclasses
import json
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from engine.api.loraplex.v1 import engine_pb2, engine_pb2_grpc
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.api.loraplex.v1 import generation_pb2_grpc as services
from engine.client import DeadlineExceeded, ResourceExhausted, Sampling, TokenCount, Unavailable, Usage
from engine.client.requests import generate_request


class Echo(services.GenerationServiceServicer):
    """Answers with the prompt, keeps the requests, and refuses the first `refusals` of them as UNAVAILABLE."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: dict[str, str | bytes] = {}

    async def Generate(self, request, context):
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if len(self.requests) <= self.refusals:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "full")
        step = pb.TokenLogprobs(
            token=pb.TokenLogprob(token_id=7, logprob=-0.5, text="x"), top=[pb.TokenLogprob(token_id=8)]
        )
        return pb.GenerateResponse(
            completions=[
                pb.Completion(
                    index=0, text=request.text, token_ids=[7], finish_reason=pb.FINISH_REASON_STOP, logprobs=[step]
                ),
                pb.Completion(index=1, text="second", token_ids=[8, 9], finish_reason=pb.FINISH_REASON_LENGTH),
            ],
            adapter=pb.ResolvedAdapter(name="support", version="v3", digest="sha256:d", base_fingerprint="sha256:b"),
            usage=pb.Usage(prompt_tokens=5, cached_tokens=4, completion_tokens=3),
            timings=pb.Timings(queue=Duration(nanos=250_000_000), total=Duration(seconds=2)),
            request_id=request.request_id,
            prompt_logprobs=[step],
        )

    async def CountTokens(self, request, context):
        words = request.text.split() or [turn.content for turn in request.chat.messages]
        return pb.CountTokensResponse(prompt_tokens=len(words), context_length=2048, token_ids=range(len(words)))


class Engine(engine_pb2_grpc.EngineServiceServicer):
    async def GetEngine(self, request, context):
        return engine_pb2.GetEngineResponse(engine="fake", limits=engine_pb2.Limits(context_length=2048))


async def test_text_round_trip(connect):
    """A prompt comes back as a frozen result with text, tokens, adapter, usage, seconds and log probabilities."""
    client = await connect(Echo())
    answer = await client.generate(adapter="support", prompt="Grüße 🙂", request_id="r-1")
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Grüße 🙂", (7,), "stop")
    assert [one.finish_reason for one in answer.completions] == ["stop", "length"]
    assert str(answer.adapter) == "support@v3"
    assert answer.adapter.base_fingerprint == "sha256:b"
    assert answer.usage == Usage(prompt_tokens=5, cached_tokens=4, completion_tokens=3)
    assert (answer.timings.queue_s, answer.timings.adapter_wait_s, answer.timings.total_s) == (0.25, 0.0, 2.0)
    assert answer.request_id == "r-1"
    assert (answer.logprobs[0].token.logprob, answer.logprobs[0].top[0].token_id) == (-0.5, 8)
    assert answer.prompt_logprobs == answer.logprobs
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.request_id = "other"


async def test_every_keyword_reaches_the_server(connect):
    """Each keyword arrives in the field of its name, and there is a keyword for every sampling field."""
    echo = Echo()
    client = await connect(echo, metadata=(("x-team", "search"),))
    sampling = {
        "max_tokens": 16,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 40,
        "min_p": 0.25,
        "seed": 2**40,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "n": 2,
        "logprobs": 0,
        "prompt_logprobs": 3,
        "logit_bias": {5: -100.0},
        "ignore_eos": True,
    }
    fields = set(pb.SamplingParams.DESCRIPTOR.fields_by_name) - {"structured"}
    constraints = set(pb.StructuredOutput.DESCRIPTOR.fields_by_name)
    assert fields == set(sampling)
    assert fields | constraints == set(Sampling.__annotations__)

    await client.generate(
        adapter="support@v2",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        priority=-3,
        request_id="r/1",
        routing_key="user-7",
        labels={"team": "search"},
        regex="[a-z]+",
        **sampling,
    )
    assert echo.requests == [
        pb.GenerateRequest(
            adapter="support@v2",
            chat=pb.Chat(
                messages=[
                    pb.ChatMessage(role=pb.ROLE_SYSTEM, content="Be brief."),
                    pb.ChatMessage(role=pb.ROLE_USER, content="Hello"),
                ]
            ),
            sampling=pb.SamplingParams(structured=pb.StructuredOutput(regex="[a-z]+"), **sampling),
            priority=-3,
            request_id="r/1",
            routing_key="user-7",
            labels={"team": "search"},
        )
    ]
    assert echo.metadata["x-team"] == "search"


def test_left_out_and_none_are_the_same():
    """A keyword that is None sets nothing, zero is a value, and no sampling keyword means no sampling message."""
    request = generate_request({"prompt": "x", "seed": None, "adapter": None, "timeout_s": 3.0})
    assert request == pb.GenerateRequest(text="x")
    assert generate_request({"prompt": "x", "temperature": 0}).sampling.HasField("temperature")


def test_structured_output_forms():
    """A schema may be text or a mapping, a choice is a list of options, a single stop string stays whole."""
    schema = {"type": "object", "title": "Größe"}
    as_mapping = generate_request({"prompt": "x", "json_schema": schema}).sampling.structured
    assert json.loads(as_mapping.json_schema) == schema
    assert generate_request({"prompt": "x", "json_schema": "{}"}).sampling.structured.json_schema == "{}"
    assert generate_request({"prompt": "x", "choice": ["a", "b"]}).sampling.structured.choice.options == ["a", "b"]
    assert generate_request({"prompt": "x", "grammar": "start: A"}).sampling.structured.grammar == "start: A"
    assert generate_request({"prompt": [1, 2], "stop": "END"}).sampling.stop == ["END"]
    assert generate_request({"prompt": [1, 2]}).token_ids.ids == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of prompt= and messages="),
        ({"prompt": "x", "messages": []}, "exactly one of prompt= and messages="),
        ({"prompt": "x", "max_token": 3}, "unknown keyword max_token"),
        ({"prompt": "x", "regex": "a", "choice": ["b"]}, "only one of regex= and choice="),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is none of system, user, assistant"),
        ({"messages": [{"role": "user", "text": "x"}]}, "the keys role and content, not role, text"),
    ],
)
async def test_mistakes_in_keywords_fail_before_anything_is_sent(connect, options, message):
    """What makes no request is a TypeError or ValueError where it was written, streams included."""
    echo = Echo()
    client = await connect(echo)
    with pytest.raises((TypeError, ValueError), match=message):
        await client.generate(**options)
    with pytest.raises((TypeError, ValueError), match=message):
        client.stream(**options)
    assert echo.requests == []


async def test_count_tokens_and_engine(connect):
    """Counting takes text or messages; the engine's limits come as the typed message."""
    client = await connect(Echo(), Engine())
    assert await client.count_tokens("one two") == TokenCount(2, 2048, (0, 1))
    assert (await client.count_tokens(messages=[{"role": "user", "content": "hi"}])).prompt_tokens == 1
    assert (await client.engine()).limits.context_length == 2048


@pytest.mark.parametrize("size", [1, 1_000_000])
async def test_unavailable_is_tried_again(connect, size):
    """A refusal before the first message is retried, whatever the prompt's size."""
    echo = Echo(refusals=1)
    client = await connect(echo)
    assert (await client.generate(prompt="x" * size)).text == "x" * size
    assert len(echo.requests) == 2


async def test_retries_are_bounded(connect):
    """Retries end after the number asked for; none are made when none are wanted."""
    for retries in (0, 2):
        echo = Echo(refusals=100)
        client = await connect(echo, retries=retries)
        with pytest.raises(Unavailable, match="full"):
            await client.generate(prompt="x")
        assert len(echo.requests) == retries + 1


async def test_retries_make_no_storm(connect):
    """While a server refuses everything, a client's retries add a tenth to its load at most, however many it may make."""
    echo = Echo(refusals=10**6)
    client = await connect(echo, retries=4)

    async def ask() -> None:
        with pytest.raises(Unavailable):
            await client.generate(prompt="x")

    for _ in range(10):
        await asyncio.gather(*(ask() for _ in range(20)))
    assert 200 < len(echo.requests) <= 220


async def test_deadline(connect):
    """Without an answer in time the call fails as DeadlineExceeded, by the client's deadline or the call's own."""

    class Slow(services.GenerationServiceServicer):
        async def Generate(self, request, context):
            deadlines.append(context.time_remaining())
            await never.wait()

    deadlines: list[float] = []
    never = asyncio.Event()
    client = await connect(Slow(), timeout_s=0.3)
    for options, expected in (({}, 0.3), ({"timeout_s": 0.1}, 0.1)):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await client.generate(prompt="x", **options)
        assert expected * 0.8 < time.monotonic() - began < expected + 1
    assert deadlines[1] < 0.2


async def test_cancelling_the_task_cancels_the_request(connect):
    """A task that is cancelled, here by asyncio.timeout, frees the server and sees its own cancellation."""

    class Endless(services.GenerationServiceServicer):
        async def Generate(self, request, context):
            try:
                await asyncio.Event().wait()
            finally:
                released.set()

    released = asyncio.Event()
    client = await connect(Endless())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.generate(prompt="x")
    await asyncio.wait_for(released.wait(), 2)


async def test_messages_above_the_limit_are_refused(connect):
    """A request above max_message_bytes never leaves the client."""
    echo = Echo()
    client = await connect(echo, max_message_bytes=1000)
    with pytest.raises(ResourceExhausted):
        await client.generate(prompt="x" * 2000)
    assert echo.requests == []
