"""Answers over the wire: whole and in pieces, with everything that belongs to them."""

from __future__ import annotations

import asyncio

import pytest

from engine.api.loraplex.v1 import engine_pb2
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client.testing import FakeServer
from tests.unit.server.conftest import Stubs, all_of, ask, ask_stream, first_of


async def test_unary(stubs: Stubs, server: FakeServer, name: str) -> None:
    """An answer has its text, tokens, end, sums and times, and says who gave it."""
    await asyncio.to_thread(server.publish, name)
    answer = await stubs.generation.Generate(ask("hello", name))
    (completion,) = answer.completions
    assert completion.text == f"{name}@v1 heard: hello"
    assert completion.finish_reason == pb.FINISH_REASON_STOP
    assert bytes(token for token in completion.token_ids if token < 256).decode() == completion.text
    assert (answer.adapter.name, answer.adapter.version) == (name, "v1")
    assert answer.adapter.digest.startswith("sha256:")
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(completion.token_ids)
    times = [getattr(answer.timings, part).ToTimedelta() for part in ("queue", "time_to_first_token", "total")]
    assert times == sorted(times)
    assert answer.request_id


async def test_base(stubs: Stubs) -> None:
    """The base model answers under no name, and its fingerprint is that of GetEngine."""
    answer = await stubs.generation.Generate(ask())
    engine = await stubs.engine.GetEngine(engine_pb2.GetEngineRequest())
    assert answer.completions[0].text == "base heard: hi"
    assert (answer.adapter.name, answer.adapter.version, answer.adapter.digest) == ("", "", "")
    assert answer.adapter.base_fingerprint == engine.base.fingerprint


@pytest.mark.parametrize("sampling", [{}, {"n": 3, "temperature": 1.0, "seed": 5}, {"logprobs": 2}, {"max_tokens": 1}])
async def test_stream_adds_up_to_unary(stubs: Stubs, sampling: dict[str, float]) -> None:
    """Messages are numbered without gaps, the last one has the sums, and together they are the unary answer."""
    messages = await all_of(stubs.generation.GenerateStream(ask_stream("größe", **sampling)))
    unary = await stubs.generation.Generate(ask("größe", **sampling))
    assert [message.sequence for message in messages] == list(range(len(messages)))
    *before, last = messages
    assert not any(message.HasField("usage") or message.HasField("timings") for message in before)
    assert last.HasField("timings")
    assert last.usage == unary.usage
    assert messages[0].adapter == unary.adapter
    assert messages[0].request_id
    assert not any(message.HasField("adapter") or message.request_id for message in messages[1:])
    for completion in unary.completions:
        mine = [message for message in messages if message.index == completion.index]
        assert "".join(message.text for message in mine) == completion.text
        assert [token for message in mine for token in message.token_ids] == completion.token_ids
        assert [place for message in mine for place in message.logprobs] == completion.logprobs
        assert [message.finish_reason for message in mine[:-1]] == [0] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason


async def test_prompt_logprobs(stubs: Stubs) -> None:
    """They come on the first message, one for each token of the prompt after the first."""
    messages = await all_of(stubs.generation.GenerateStream(ask_stream("hello", prompt_logprobs=1)))
    unary = await stubs.generation.Generate(ask("hello", prompt_logprobs=1))
    assert len(messages[0].prompt_logprobs) == 4
    assert messages[0].prompt_logprobs == unary.prompt_logprobs
    assert not any(message.prompt_logprobs for message in messages[1:])


async def test_finish_length(stubs: Stubs) -> None:
    """An answer that max_tokens ends says so."""
    answer = await stubs.generation.Generate(ask(max_tokens=3))
    assert (answer.completions[0].text, answer.completions[0].finish_reason) == ("bas", pb.FINISH_REASON_LENGTH)


async def test_stop(stubs: Stubs) -> None:
    """A stop string ends the text before it."""
    messages = await all_of(stubs.generation.GenerateStream(ask_stream("hello", stop=["heard", "never"])))
    assert "".join(message.text for message in messages) == "base "
    assert messages[-1].finish_reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize(
    "structured",
    [
        pb.StructuredOutput(choice=pb.Choice(options=["yes", "no"])),
        pb.StructuredOutput(regex="yes|no"),
        pb.StructuredOutput(grammar='start: "yes" | "no"'),
        pb.StructuredOutput(json_schema='{"enum": ["yes", "no"]}'),
    ],
)
async def test_structured(stubs: Stubs, structured: pb.StructuredOutput) -> None:
    """Every kind of constraint is kept."""
    answer = await stubs.generation.Generate(ask(structured=structured))
    assert answer.completions[0].text.strip('"') in ("yes", "no")


async def test_prompt_forms(stubs: Stubs) -> None:
    """Text, token ids and a conversation are three forms of a prompt."""
    by_ids = await stubs.generation.Generate(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=list(b"hi")), sampling=pb.SamplingParams(temperature=0))
    )
    assert by_ids.completions[0].text == "base heard: hi"
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="hi")])
    by_chat = await stubs.generation.Generate(pb.GenerateRequest(chat=chat, sampling=pb.SamplingParams(temperature=0)))
    assert by_chat.completions[0].text == "base heard: user: hi\nassistant:"


async def test_count_tokens(stubs: Stubs) -> None:
    """Counting says what Generate would count."""
    counted = await stubs.generation.CountTokens(pb.CountTokensRequest(text="größe"))
    assert counted.prompt_tokens == 7
    assert bytes(counted.token_ids).decode() == "größe"
    assert counted.context_length == 2048
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="hi")])
    assert (await stubs.generation.CountTokens(pb.CountTokensRequest(chat=chat))).prompt_tokens > 2


async def test_request_ids(stubs: Stubs) -> None:
    """The caller's id comes back: from the request, or else from the metadata; else the server makes one."""
    metadata = (("x-request-id", "from-metadata"),)
    inside = ask()
    inside.request_id = "from-request"
    assert (await stubs.generation.Generate(inside, metadata=metadata)).request_id == "from-request"
    assert (await stubs.generation.Generate(ask(), metadata=metadata)).request_id == "from-metadata"
    streamed = stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=inside), metadata=metadata)
    assert (await first_of(streamed)).request_id == "from-request"
    made = {(await stubs.generation.Generate(ask())).request_id for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("bad", ["white space", "x" * 129, 'quote"', "new~line"])
async def test_malformed_request_id_in_metadata(stubs: Stubs, bad: str) -> None:
    """An id that would spoil the log is replaced, not refused: proxies add such headers."""
    answer = await stubs.generation.Generate(ask(), metadata=(("x-request-id", bad),))
    assert answer.request_id
    assert answer.request_id != bad


async def test_request_ids_of_calls_at_once(stubs: Stubs) -> None:
    """Calls that run at the same time never get each other's id."""

    async def one(number: int) -> bool:
        request = ask(str(number))
        request.request_id = f"number-{number}"
        answer = await stubs.generation.Generate(request)
        return answer.request_id == f"number-{number}" and answer.completions[0].text == f"base heard: {number}"

    assert all(await asyncio.gather(*(one(number) for number in range(50))))


async def test_labels_and_priority(stubs: Stubs) -> None:
    """Labels and a priority are accepted up to their limits."""
    request = ask()
    request.priority = 100
    for number in range(16):
        request.labels[f"{number:064d}"] = "x" * 256
    assert (await stubs.generation.Generate(request)).completions[0].text == "base heard: hi"


async def test_limits_themselves_are_allowed(stubs: Stubs) -> None:
    """The largest and the smallest allowed values are allowed."""
    smallest = {"min_tokens": 0, "top_k": 0, "min_p": 0, "seed": 0, "logprobs": 0, "presence_penalty": -2}
    largest = {"temperature": 2, "top_p": 1, "min_p": 1, "seed": 2**63 - 1, "n": 16, "logprobs": 20, "max_tokens": 8}
    for sampling in (smallest, largest):
        assert (await stubs.generation.Generate(ask(**sampling))).completions
