"""The OpenAI-compatible API with the real engine and real adapters, by the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from engine.client import AsyncClient
from engine.server.app import App
from tests.e2e.conftest import MODEL, heldout

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
]
CHAT = [{"role": "user", "content": "Say hello."}]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def api(app: App, published: list[str]) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, connected to the server of all end-to-end tests."""
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{app.http_port}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def test_adapters_do_their_task(api: openai.AsyncOpenAI) -> None:
    """Each model is its adapter: at least eight in ten held-out rows are answered rightly."""
    for ref in ("support@v1", "legal@v1"):
        rows = heldout(ref, 10)
        asked = (
            api.completions.create(model=ref, prompt=prompt, temperature=0, max_tokens=28, stop="\n")
            for prompt, _ in rows
        )
        answers = await asyncio.gather(*asked)
        right = sum(a.choices[0].text.strip().lower() == b.lower() for a, (_, b) in zip(answers, rows, strict=True))
        assert right >= 8
        assert {answer.model for answer in answers} == {ref}


async def test_chat_is_that_of_grpc(api: openai.AsyncOpenAI, client: AsyncClient) -> None:
    """Whole, streamed, and over gRPC: the same text, the same tokens."""
    ours = await client.generate(messages=CHAT, temperature=0, max_tokens=12)
    ask = {"model": MODEL.name, "messages": CHAT, "temperature": 0, "max_tokens": 12}
    whole = await api.chat.completions.create(**ask)
    stream = await api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == ours.text
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == ours.text
    assert whole.usage
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens == ours.usage.prompt_tokens


async def test_structured_and_logprobs(api: openai.AsyncOpenAI) -> None:
    """A JSON schema shapes the answer, and log probabilities belong to its tokens."""
    schema = {"type": "string", "enum": ["yes", "no"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = await api.chat.completions.create(
        model="support", messages=CHAT, max_tokens=40, response_format=form, logprobs=True, top_logprobs=3, seed=1
    )
    text = answer.choices[0].message.content or ""
    assert json.loads(text) in ("yes", "no")
    content = answer.choices[0].logprobs.content
    assert text in "".join(one.token for one in content)
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)


async def test_n_and_seed(api: openai.AsyncOpenAI) -> None:
    """Several sampled answers differ, and the same seed brings them again."""
    ask = {"model": "code", "prompt": "The", "n": 3, "seed": 5, "max_tokens": 8, "temperature": 1}
    first, again = [await api.completions.create(**ask) for _ in range(2)]
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1


async def test_hanging_up(api: openai.AsyncOpenAI, app: App) -> None:
    """A stream that is closed early leaves nothing running."""
    stream = await api.completions.create(
        model="support", prompt="On", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(5):
        while app.admission.running:
            await asyncio.sleep(0.02)
