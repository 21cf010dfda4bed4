"""The OpenAI-compatible API, by the official client and by hand, on a server with made-up answers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import openai
import pytest
from pydantic import ValidationError

from engine.client import Client
from engine.client.testing import FakeServer, fake_server
from engine.server import http
from engine.server.app import App
from engine.server.web.openai import requests
from engine.server.web.openai.merged import merged
from engine.server.web.refusal import Refused
from tests.unit.server.conftest import engine_of, running, until

NO_SUCH = (
    "best_of",
    "suffix",
    "tools",
    "functions",
    "modalities",
    "audio",
    "prediction",
    "reasoning_effort",
    "whatever",
)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    """A server with two versions of an adapter, of which the first is current."""
    with fake_server(refresh_s=60, max_message_mib=1) as server:
        server.publish("support")
        server.publish("support")
        server.promote("support", "v2", "canary")
        yield server


@pytest.fixture(scope="module")
def base(fake: FakeServer) -> str:
    """The base model's name."""
    return fake.app.settings.model.name


@pytest.fixture(scope="module")
def client(fake: FakeServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{fake.http_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def say(client: openai.OpenAI, text: str = "hi", model: str = "support", **more: Any) -> Any:
    """One greedy chat."""
    given = {"temperature": 0, "messages": [{"role": "user", "content": text}]} | more
    return client.chat.completions.create(model=model, **given)


async def post(fake: FakeServer, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Send a request as it is; its status, headers and JSON."""
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    headers = {"Content-Type": "application/json"} | headers
    async with aiohttp.ClientSession() as session:
        async with session.post(fake.http_url + path, data=data, headers=headers) as answer:
            return answer.status, dict(answer.headers), await answer.json()


def test_models(client: openai.OpenAI, base: str) -> None:
    """The base model, the adapter, its aliases and its versions are there, each with what it stands for."""
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert set(models) == {
        base, "support", "support@current", "support@canary", "support@v1", "support@v2",
    }  # fmt: skip
    assert models["support"]["root"] == models["support@current"]["root"] == "support@v1"
    assert models["support@canary"]["root"] == "support@v2"
    assert models["support"]["parent"] == base
    assert client.models.retrieve("support@v2").id == "support@v2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_names_the_version_that_answered(client: openai.OpenAI) -> None:
    """The answer is the adapter's, and model, fingerprint and headers say which version gave it."""
    raw = client.chat.completions.with_raw_response.create(
        model="support", temperature=0, messages=[{"role": "user", "content": "hi"}]
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "support@v1 heard: user: hi\nassistant:"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == raw.headers["x-loraplex-version"] == "support@v1"
    assert answer.system_fingerprint == raw.headers["x-loraplex-digest"]
    assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"
    usage = answer.usage
    assert usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_every_form_of_a_model(fake: FakeServer, client: openai.OpenAI, base: str) -> None:
    """Versions, aliases and the base by name or fingerprint are answered by whom they name."""
    fingerprint = say(client, model=base).system_fingerprint
    said = {"support@v2": "support@v2", "support@canary": "support@v2", base: "base", fingerprint: "base"}
    for model, who in said.items():
        assert say(client, model=model).choices[0].message.content.startswith(f"{who} heard")


def test_chat_without_max_tokens_is_not_cut_short(client: openai.OpenAI) -> None:
    """An answer that is longer than the gRPC API's default of 128 tokens comes whole."""
    answer = say(client, "x" * 300)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 300


def test_content_in_parts_and_developer_role(client: openai.OpenAI) -> None:
    """Text parts are put together, and a developer is a system."""
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert "system: be brief\nuser: ab\n" in say(client, messages=messages).choices[0].message.content


def test_sampling(client: openai.OpenAI) -> None:
    """max_tokens, stop, n, seed and vLLM's own parameters do what they say."""
    cut = say(client, max_tokens=4)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("supp", "length")
    assert say(client, max_completion_tokens=4).choices[0].message.content == "supp"
    assert say(client, stop=" heard").choices[0].message.content == "support@v1"
    several = say(client, n=3, temperature=1, seed=7)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in say(client, n=3, temperature=1, seed=7).choices]
    assert say(client, extra_body={"ignore_eos": True, "top_k": -1}, max_tokens=60).usage.completion_tokens == 60


def test_structured_output(client: openai.OpenAI) -> None:
    """JSON schemas, JSON objects and vLLM's constraints shape the answer; a broken schema is refused by its field."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert set(json.loads(say(client, response_format=form).choices[0].message.content)) == {"ok"}
    assert isinstance(json.loads(say(client, response_format={"type": "json_object"}).choices[0].message.content), dict)
    choice = say(client, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert choice.choices[0].message.content in ("left", "right")
    form["json_schema"]["schema"] = {"type": "nonsense"}  # type: ignore[index]
    with pytest.raises(openai.BadRequestError) as refused:
        say(client, response_format=form)
    assert refused.value.param == "response_format"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """Each token has its log probability, its bytes and as many alternatives as were asked for."""
    content = say(client, logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs.content
    assert [one.token for one in content] == list("sup")
    assert all(
        one.logprob < 0 and len(one.top_logprobs) == 2 and bytes(one.bytes).decode() == one.token for one in content
    )


def test_stream(client: openai.OpenAI) -> None:
    """A stream's pieces make the whole answer, and usage comes last if it is asked for."""
    with say(client, stream=True, stream_options={"include_usage": True}, n=2, temperature=1, seed=1) as stream:
        chunks = list(stream)
    whole = say(client, n=2, temperature=1, seed=1)
    for index in (0, 1):
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert pieces[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in pieces) == whole.choices[index].message.content
        assert [c.finish_reason for c in pieces if c.finish_reason] == ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.model for chunk in chunks} == {"support@v1"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_helper(client: openai.OpenAI) -> None:
    """The client's own accumulating helper takes the stream, too."""
    with client.chat.completions.stream(
        model="support", temperature=0, messages=[{"role": "user", "content": "a"}]
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "support@v1 heard: user: a\nassistant:"


def test_completions(client: openai.OpenAI) -> None:
    """Texts, several of them, token ids, echo and log probabilities; 16 tokens by default."""
    ask = client.completions.create
    one = ask(model="support", prompt="hi", temperature=0)
    assert (one.choices[0].text, one.choices[0].finish_reason) == ("support@v1 heard", "length")
    more = ask(model="support", prompt=["a", "b"], n=2, temperature=1, seed=3, max_tokens=50, echo=True)
    assert [choice.index for choice in more.choices] == [0, 1, 2, 3]
    assert [choice.text[:20] for choice in more.choices] == ["asupport@v1 heard: a"] * 2 + ["bsupport@v1 heard: b"] * 2
    assert "heard: AB" in ask(model="support", prompt=[65, 66], temperature=0, max_tokens=50).choices[0].text
    assert len(ask(model="support", prompt=[[65], [66]], temperature=0).choices) == 2
    logprobs = ask(model="support", prompt="x", temperature=0, logprobs=1, max_tokens=3).choices[0].logprobs
    assert logprobs
    assert (logprobs.tokens, logprobs.text_offset) == (list("sup"), [0, 1, 2])


def test_completions_stream(client: openai.OpenAI) -> None:
    """Several prompts stream side by side, each under its own index."""
    stream = client.completions.create(model="support", prompt=["a", "b"], temperature=0, stream=True, max_tokens=50)
    texts = {0: "", 1: ""}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "support@v1 heard: a", 1: "support@v1 heard: b"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6, "temperature": 1}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**7}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": 2040}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logprobs": True, "top_logprobs": 100}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(2**40): 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"model": ""}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"model": "a\r\nx: y"}, "model"),
        ({"user": "u" * 300}, "user"),
        *(({name: 1}, name) for name in NO_SUCH),
    ],
)
async def test_bad_fields(fake: FakeServer, change: dict[str, Any], param: str | None) -> None:
    """A field that is wrong, or that cannot be honoured, is named; nothing of it reaches the engine."""
    body = {"model": "support", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]} | change
    status, headers, answer = await post(fake, "/v1/chat/completions", body)
    assert (status, headers["x-should-retry"]) == (400, "false")
    assert answer["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert answer["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (requests.ChatRequest, {"messages": [1] * 5000}, "messages[0]"),
        (requests.ChatRequest, {"messages": [{}] * 1025}, "messages[0].role"),
        (requests.ChatRequest, {"messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
        (requests.ChatRequest, {"messages": [{"role": "user", "content": [1] * 5000}]}, "messages[0].content"),
        (requests.ChatRequest, {"messages": [dict.fromkeys(map(str, range(5000)))]}, "messages[0].role"),
        (requests.ChatRequest, {"messages": [], **dict.fromkeys(map(str, range(5000)))}, "0"),
        (requests.ChatRequest, {"messages": [], "stop": [1] * 5000}, "stop"),
        (requests.ChatRequest, {"messages": [], "stop_token_ids": ["x"] * 5000}, "stop_token_ids[0]"),
        (requests.ChatRequest, {"messages": [], "logit_bias": dict.fromkeys(map(str, range(5000)))}, "logit_bias.0"),
        (requests.ChatRequest, {"messages": [], "structured_outputs": {"choice": [1] * 5000}}, "structured_outputs.choice[0]"),
        (requests.CompletionRequest, {"prompt": [1, *["x"] * 5000]}, "prompt[1]"),
        (requests.CompletionRequest, {"prompt": ["x", *[1] * 5000]}, "prompt[1]"),
        (requests.CompletionRequest, {"prompt": [[1], *[["x"] * 5000] * 5]}, "prompt[1][0]"),
        (requests.CompletionRequest, {"prompt": [None] * 5000}, "prompt[0]"),
    ],
)  # fmt: skip
def test_errors_are_few(kind: type[requests.GenerationRequest], body: dict[str, Any], param: str) -> None:
    """However much is wrong, pydantic keeps a handful of errors, and the first is named."""
    with pytest.raises(Refused) as caught:
        requests.read(kind, json.dumps(body).encode())
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() <= 301
    assert caught.value.refusal.violations[0][0] == param


def test_forms_of_a_prompt() -> None:
    """Text, texts, token ids and lists of them are told apart by what they begin with, and token ids are no errors."""
    for prompt, prompts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1] * 5000, [[1] * 5000]),
        ([[1], [2]], [[1], [2]]),
    ):
        assert requests.read(requests.CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompts == prompts


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"echo": True}])
async def test_no_prompt(fake: FakeServer, more: dict[str, Any]) -> None:
    """A completion of no prompt at all is refused, streamed and with echo, too."""
    status, _, answer = await post(fake, "/v1/completions", {"model": "support", "prompt": []} | more)
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert answer["error"]["message"] == "prompt: is an empty list: give at least one prompt"


@pytest.mark.parametrize(
    ("data", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"model": "\\ud800"}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"{}", "text/plain", 400),
        (b" " * (1024 * 1024 + 1), "application/json", 413),
    ],
)
async def test_bad_bodies(fake: FakeServer, data: bytes, content_type: str, status: int) -> None:
    """A body that is not JSON, or too large, is refused as an error object."""
    for path in ("/v1/chat/completions", "/v1/completions"):
        found, _, answer = await post(fake, path, data, **{"Content-Type": content_type})
        assert found == status
        assert answer["error"]["message"]


async def test_other_paths_and_methods(fake: FakeServer) -> None:
    """What is not there is told as an error object, too."""
    status, _, answer = await post(fake, "/v1/embeddings", {})
    assert (status, answer["error"]["code"]) == (404, "page_not_found")
    status, _, answer = await post(fake, "/v1/models", {})
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")


async def test_pages_of_other_sites_are_refused(fake: FakeServer) -> None:
    """Neither a page of another site nor a name that leads here by trick may use what only this machine should."""
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}
    wrong = [{"Origin": name} for name in ("https://evil.example", "null", "http://[")]
    wrong += [{"Host": name} for name in ("evil.example:9090", "[", "[::1")]
    for headers in wrong:
        status, _, answer = await post(fake, "/v1/chat/completions", body, **headers)
        assert (status, answer["error"]["type"]) == (403, "permission_error")


def test_unknown_model(client: openai.OpenAI) -> None:
    """An adapter that is not there is OpenAI's own error, with the nearest name."""
    with pytest.raises(openai.NotFoundError) as refused:
        say(client, model="suport")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert "support" in refused.value.message


def test_ids_and_tenants(client: openai.OpenAI) -> None:
    """The caller's own request id comes back; a malformed tenant is refused as over gRPC."""
    raw = client.with_options(default_headers={"x-request-id": "mine-1"}).chat.completions.with_raw_response
    assert raw.create(model="support", messages=[{"role": "user", "content": "hi"}]).headers["x-request-id"] == "mine-1"
    with pytest.raises(openai.BadRequestError):
        say(client, extra_headers={"x-loraplex-tenant": "no spaces"})


def test_prompts_of_one_request_have_one_version(fake: FakeServer, client: openai.OpenAI) -> None:
    """While a canary stands, chance decides for a request without a user, and for all its prompts alike: one is named."""
    for _ in range(2):
        fake.publish("split")
    with Client(fake.target) as ours:
        ours.adapters.set_canary("split", 0.5, version="v2")
    named = set()
    for _ in range(20):
        answer = client.completions.create(model="split", prompt=list("abcdef"), temperature=0)
        assert {choice.text.partition(" ")[0] for choice in answer.choices} == {answer.model}
        named.add(answer.model)
    assert named == {"split@v1", "split@v2"}


async def test_overload_tells_when_to_try_again(make_app: Callable[..., App]) -> None:
    """A full server answers 503 with a retry hint, and the official client obeys it."""
    async with running(make_app(max_running=1, max_waiting=0)) as app:
        app.engine.engine.token_interval_s = 0.01  # type: ignore[attr-defined]
        url = f"http://127.0.0.1:{app.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asking:
            ask: dict[str, Any] = {"model": "fake-base", "messages": [{"role": "user", "content": "x" * 100}]}
            stream = await asking.chat.completions.create(**ask, stream=True)
            with pytest.raises(openai.InternalServerError) as refused:
                await asking.chat.completions.create(**ask)
            assert refused.value.status_code == 503
            assert refused.value.code == "overloaded"
            assert int(refused.value.response.headers["retry-after-ms"]) > 0
            await stream.close()


async def test_hanging_up_frees_the_engine(fake: FakeServer) -> None:
    """A client that leaves, before its first token or in the middle of a stream, takes its request with it."""
    engine, admission = engine_of(fake), fake.app.admission
    engine.token_interval_s = 0.02
    ask: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "x" * 200}]}
    try:
        async with openai.AsyncOpenAI(base_url=f"{fake.http_url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**ask, stream=True)
            await anext(aiter(stream))
            whole = asyncio.ensure_future(client.chat.completions.create(**ask))
            await until(lambda: len(engine.running) == 2)
            await stream.close()
            whole.cancel()
            await until(lambda: not engine.running and not admission.running)
    finally:
        engine.token_interval_s = 0.0


async def test_error_in_the_middle_of_a_stream(fake: FakeServer) -> None:
    """An answer that breaks off ends with an error that the client raises, not as if it were complete."""
    engine = engine_of(fake)
    await asyncio.to_thread(fake.publish, "sick")
    engine.not_finite.add("sick@v1")
    try:
        async with openai.AsyncOpenAI(base_url=f"{fake.http_url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model="sick", prompt="x", stream=True)
            with pytest.raises(openai.APIError) as broken:
                [chunk async for chunk in stream]
            assert broken.value.code == "not_finite"
    finally:
        engine.not_finite.clear()


async def test_slow_and_many_connections(make_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that sends no request is closed, one too many at once; who asks is served on."""
    monkeypatch.setattr(http, "FIRST_REQUEST_S", 0.1)
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)
    app = make_app()
    port = await app.side_port.start("127.0.0.1", 0)
    try:
        served, silent, slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        slow[1].write(b"GET /healthz HTTP/1.1\r\nX-Slow:")
        served[1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await served[0].readline()
        many = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            for reader, _ in (many, silent, slow):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
        served[1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await served[0].readuntil(b"200 OK")
        for _, writer in (served, silent, slow, many):
            writer.close()
    finally:
        await app.side_port.stop()


def test_not_ready(make_app: Callable[..., App]) -> None:
    """Until the engine is there, clients are told to try again."""
    app = make_app()

    async def ask() -> tuple[int, str]:
        port = await app.side_port.start("127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/v1/models") as answer:
                    return answer.status, (await answer.json())["error"]["code"]
        finally:
            await app.side_port.stop()

    assert asyncio.run(ask()) == (503, "not_ready")


async def test_merged_streams() -> None:
    """All items of all streams come; an error in one ends them, and closing early closes each."""
    closed: list[int] = []

    async def count(number: int, fail: bool = False) -> AsyncIterator[int]:
        try:
            for item in range(3):
                await asyncio.sleep(0)
                yield item
            if fail:
                raise ValueError(number)
        finally:
            closed.append(number)

    assert sorted([one async for one in merged([count(0), count(1)])]) == [(n, i) for n in (0, 1) for i in range(3)]
    with pytest.raises(ValueError, match="1"):
        [one async for one in merged([count(0), count(1, fail=True)])]
    early = merged([count(2), count(3)])
    await anext(early)
    await early.aclose()
    assert sorted(closed) == [0, 0, 1, 1, 2, 3]
