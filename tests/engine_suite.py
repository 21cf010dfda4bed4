"""How every engine behaves: one suite, run on the fake engine in the unit tests and on vLLM in tests/e2e.

A test class inherits EngineSuite and gives it the fixtures `engine` (started), `adapters` (two, not yet loaded) and
`question` (a prompt that the two adapters and the base answer differently).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidAdapter, InvalidRequest
from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.runtime.engine import (
    Delta,
    Engine,
    EngineRequest,
    LoadedAdapter,
    PositionLogprobs,
    Resume,
    Sampling,
    Structured,
)

_numbers = itertools.count(1)
_GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class Reply:
    """The deltas of one request, put together by answer."""

    def __init__(self, deltas: list[Delta]) -> None:
        self.deltas = deltas

    def of(self, index: int) -> list[Delta]:
        """One answer's deltas."""
        return [delta for delta in self.deltas if delta.index == index]

    @property
    def text(self) -> str:
        """The first answer's text."""
        return "".join(delta.text for delta in self.of(0))

    @property
    def tokens(self) -> list[int]:
        """The first answer's tokens."""
        return [token for delta in self.of(0) for token in delta.token_ids]

    @property
    def logprobs(self) -> list[PositionLogprobs]:
        """The first answer's log probabilities."""
        return [place for delta in self.of(0) for place in delta.logprobs]

    @property
    def finish(self) -> str | None:
        """Why the first answer ended."""
        return self.of(0)[-1].finish_reason


async def request_for(
    engine: Engine, prompt: str, adapter: LoadedAdapter | None = None, **sampling: Any
) -> EngineRequest:
    """A greedy request of 24 tokens, unless `sampling` says otherwise."""
    return EngineRequest(
        id=f"suite-{next(_numbers)}",
        prompt_token_ids=await engine.encode(prompt),
        sampling=Sampling(**(_GREEDY | sampling)),
        adapter=adapter,
    )


async def ask(engine: Engine, prompt: str, adapter: LoadedAdapter | None = None, **sampling: Any) -> Reply:
    """Ask, and wait for the whole reply."""
    request = await request_for(engine, prompt, adapter, **sampling)
    engine.check(request.sampling)
    async with aclosing(engine.generate(request)) as deltas:
        return Reply([delta async for delta in deltas])


async def until_nothing_runs(engine: Engine) -> None:
    """Return when the engine has nothing left to do; fails after three seconds."""
    async with asyncio.timeout(3):
        while engine.load_now().running:
            await ask(engine, "x", max_tokens=1)  # engines report their load when they take a step
            await asyncio.sleep(0.02)


@asynccontextmanager
async def loaded(engine: Engine, *adapters: LoadedAdapter) -> AsyncIterator[None]:
    """Keep adapters in the engine for the time of the block."""
    async with AsyncExitStack() as stack:
        for adapter in adapters:
            await engine.load_adapter(adapter)
            stack.push_async_callback(engine.unload_adapter, adapter)
        yield


async def ask_in_two(engine: Engine, whole: Reply, at: int, prompt: str, **sampling: Any) -> Reply:
    """The reply to the same question, cut off after `at` deltas of `whole` and gone on with."""
    before = whole.deltas[:at]
    resume = Resume(
        tuple(token for delta in before for token in delta.token_ids), sum(len(delta.text) for delta in before)
    )
    request = replace(await request_for(engine, prompt, **sampling), resume=resume)
    async with aclosing(engine.generate(request)) as deltas:
        return Reply([*before, *[delta async for delta in deltas]])


_JSON = json.dumps(
    {
        "type": "object",
        "properties": {"size": {"enum": ["S", "M"]}, "name": {"type": "string", "maxLength": 8}},
        "required": ["size", "name"],
        "additionalProperties": False,
    }
)
_RESUMED: dict[str, dict[str, Any]] = {
    "greedy": {"ignore_eos": True},
    "logprobs": {"logprobs": 2, "ignore_eos": True},
    "seed": {"temperature": 1.0, "seed": 11, "ignore_eos": True},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "ignore_eos": True},
    "repetition": {"repetition_penalty": 1.3, "ignore_eos": True},
    "bias": {"logit_bias": {65: 2.0}, "min_p": 0.1, "top_k": 5, "ignore_eos": True},
    "structured": {"structured": Structured("json_schema", _JSON), "max_tokens": 60},
    "structured and seed": {"structured": Structured("regex", "[a-f]{12}"), "temperature": 1.0, "seed": 3},
    "min_tokens": {"min_tokens": 20},
}


class EngineSuite:
    """The behaviours; see the module's docstring for the fixtures."""

    async def test_info(self, engine: Engine) -> None:
        """A started engine is alive and knows its sizes."""
        assert engine.alive
        assert engine.info.description
        assert engine.info.context_length >= 16
        assert engine.info.vocabulary_size > max(await engine.encode("any text"))
        assert engine.info.dtype in ("float32", "bfloat16", "float16")

    async def test_greedy_is_repeatable(self, engine: Engine) -> None:
        """The same greedy request gives the same tokens."""
        first, again = await ask(engine, "Once upon a time"), await ask(engine, "Once upon a time")
        assert first.tokens == again.tokens
        assert first.text == again.text

    @pytest.mark.parametrize("count", [1, 7, 40])
    async def test_max_tokens(self, engine: Engine, count: int) -> None:
        """Past the end token, exactly max_tokens tokens come."""
        reply = await ask(engine, "Hello", max_tokens=count, ignore_eos=True)
        assert len(reply.tokens) == count
        assert reply.finish == "length"

    async def test_deltas(self, engine: Engine) -> None:
        """Each delta brings something new, and only the last one says why the answer ended."""
        reply = await ask(engine, "Hello", max_tokens=12, ignore_eos=True)
        *before, last = reply.deltas
        assert all(delta.finish_reason is None for delta in before)
        assert last.finish_reason == "length"
        assert all(delta.token_ids for delta in before)
        assert sum(len(delta.token_ids) for delta in reply.deltas) == 12

    async def test_stop_string(self, engine: Engine) -> None:
        """The text ends before the stop string, even one that begins and ends inside tokens."""
        free = await ask(engine, "The quick brown fox jumps over", ignore_eos=True)
        stop = free.text[7:12]
        reply = await ask(engine, "The quick brown fox jumps over", ignore_eos=True, stop=(stop,))
        assert reply.text == free.text[: free.text.find(stop)]
        assert reply.finish == "stop"
        assert len(reply.tokens) < len(free.tokens)

    async def test_stop_string_that_never_comes(self, engine: Engine) -> None:
        """Text that was held back because a stop string might begin there comes out at the end."""
        free = await ask(engine, "The quick brown fox jumps over", ignore_eos=True)
        reply = await ask(
            engine, "The quick brown fox jumps over", ignore_eos=True, stop=(free.text[-3:] + "\x00never",)
        )
        assert reply.text == free.text
        assert reply.finish == "length"

    async def test_stop_token(self, engine: Engine) -> None:
        """A stop token ends the answer: it is the last token, and not part of the text."""
        free = await ask(engine, "The quick brown fox jumps over", ignore_eos=True)
        stop = free.tokens[5]
        at = free.tokens.index(stop)
        reply = await ask(engine, "The quick brown fox jumps over", ignore_eos=True, stop_token_ids=(stop,))
        assert reply.tokens == free.tokens[: at + 1]
        assert reply.finish == "stop"
        before = await ask(engine, "The quick brown fox jumps over", ignore_eos=True, max_tokens=max(at, 1))
        assert reply.text == (before.text if at else "")

    async def test_min_tokens(self, engine: Engine) -> None:
        """Nothing ends the answer before min_tokens tokens."""
        free = await ask(engine, "The quick brown fox jumps over", ignore_eos=True)
        stop = (free.tokens[2],)
        early = await ask(engine, "The quick brown fox jumps over", ignore_eos=True, stop_token_ids=stop)
        late = await ask(engine, "The quick brown fox jumps over", ignore_eos=True, stop_token_ids=stop, min_tokens=9)
        assert len(early.tokens) <= 3
        assert len(late.tokens) >= 9

    async def test_several_answers(self, engine: Engine) -> None:
        """Each of n answers has an index of its own, all its tokens, and one end."""
        reply = await ask(engine, "Name a colour:", n=3, temperature=1.0, seed=7, max_tokens=32, ignore_eos=True)
        assert {delta.index for delta in reply.deltas} == {0, 1, 2}
        texts = set()
        for index in range(3):
            *before, last = reply.of(index)
            assert sum(len(delta.token_ids) for delta in (*before, last)) == 32
            assert last.finish_reason == "length"
            assert all(delta.finish_reason is None for delta in before)
            texts.add("".join(delta.text for delta in (*before, last)))
        assert len(texts) == 3

    async def test_seed(self, engine: Engine) -> None:
        """A seed repeats a sampled answer, another seed does not."""
        sampling = {"temperature": 1.0, "max_tokens": 32, "ignore_eos": True}
        first = await ask(engine, "Once", seed=1, **sampling)
        again = await ask(engine, "Once", seed=1, **sampling)
        other = await ask(engine, "Once", seed=2, **sampling)
        assert first.tokens == again.tokens
        assert first.tokens != other.tokens

    async def test_logprobs(self, engine: Engine) -> None:
        """One place per token: the token that was chosen, and the likeliest ones in order."""
        reply = await ask(engine, "Once upon a", logprobs=3, max_tokens=6, ignore_eos=True)
        assert [place.token.token_id for place in reply.logprobs] == reply.tokens
        for place in reply.logprobs:
            values = [entry.logprob for entry in place.top]
            assert values == sorted(values, reverse=True)
            assert place.top[0].token_id == place.token.token_id  # greedy
            assert 3 <= len(values) <= 4
            assert all(value <= 1e-3 for value in values)

    async def test_logprobs_of_the_chosen_token_alone(self, engine: Engine) -> None:
        """No alternatives asked for: each token's own log probability comes."""
        reply = await ask(engine, "Once upon a", logprobs=0, max_tokens=4, ignore_eos=True)
        assert [place.token.token_id for place in reply.logprobs] == reply.tokens
        assert all(len(place.top) <= 1 and -50 < place.token.logprob <= 1e-3 for place in reply.logprobs)

    async def test_no_logprobs_unless_asked(self, engine: Engine) -> None:
        """An ordinary reply carries no log probabilities."""
        reply = await ask(engine, "Once upon a", max_tokens=2)
        assert not reply.logprobs
        assert not any(delta.prompt_logprobs for delta in reply.deltas)

    async def test_prompt_logprobs(self, engine: Engine) -> None:
        """The first delta has one place for every token of the prompt after the first."""
        prompt = "Once upon a time there was"
        reply = await ask(engine, prompt, prompt_logprobs=2, max_tokens=3, ignore_eos=True)
        first, *others = reply.deltas
        assert [place.token.token_id for place in first.prompt_logprobs] == (await engine.encode(prompt))[1:]
        assert not any(delta.prompt_logprobs for delta in others)

    @pytest.mark.parametrize("sampling", _RESUMED.values(), ids=_RESUMED)
    async def test_resume(self, engine: Engine, sampling: dict[str, Any]) -> None:
        """An answer that is cut off and gone on with is the undisturbed one, wherever it was cut."""
        prompt = "The quick brown fox jumps over the"
        whole = await ask(engine, prompt, **sampling)
        for at in {1, len(whole.deltas) // 2, len(whole.deltas) - 1}:
            reply = await ask_in_two(engine, whole, at, prompt, **sampling)
            assert reply.tokens == whole.tokens, at
            assert reply.text == whole.text, at
            assert reply.finish == whole.finish, at
            assert [place.token.token_id for place in reply.logprobs] == [
                place.token.token_id for place in whole.logprobs
            ]
            differences = (
                a.token.logprob - b.token.logprob for a, b in zip(reply.logprobs, whole.logprobs, strict=True)
            )
            assert all(abs(difference) < 1e-3 for difference in differences)

    async def test_resume_across_a_stop_string(self, engine: Engine) -> None:
        """A stop string of which one half came before the cut still ends the answer, and none of it is delivered."""
        prompt = "The quick brown fox jumps over"
        free = await ask(engine, prompt, ignore_eos=True, max_tokens=40)
        stop = free.text[11:19]
        whole = await ask(engine, prompt, ignore_eos=True, max_tokens=40, stop=(stop,))
        assert whole.finish == "stop"
        for at in range(1, len(whole.deltas)):
            reply = await ask_in_two(engine, whole, at, prompt, ignore_eos=True, max_tokens=40, stop=(stop,))
            assert (reply.text, reply.finish, reply.tokens) == (whole.text, "stop", whole.tokens)

    async def test_resume_inside_a_character(self, engine: Engine) -> None:
        """A cut between the bytes of one character loses nothing of it."""
        smile = [t for t in await engine.encode("Say \U0001f600!") if t not in await engine.encode("Say !")]
        prompt, sampling = (
            "Say",
            {"max_tokens": len(smile) + 2, "ignore_eos": True, "logit_bias": dict.fromkeys(smile, 50.0)},
        )
        whole = await ask(engine, prompt, **sampling)
        for at in range(1, len(whole.deltas)):
            reply = await ask_in_two(engine, whole, at, prompt, **sampling)
            assert (reply.text, reply.tokens) == (whole.text, whole.tokens)

    @pytest.mark.parametrize(
        ("structured", "fits"),
        [
            (Structured("choice", ("red", "green (dark)")), lambda text: text in ("red", "green (dark)")),
            (
                Structured("regex", "[0-9]{3}-[a-z]{2}"),
                lambda text: re.fullmatch("[0-9]{3}-[a-z]{2}", text) is not None,
            ),
            (
                Structured(
                    "json_schema",
                    json.dumps(
                        {
                            "type": "object",
                            "properties": {"size": {"enum": ["S", "M"]}, "new": {"type": "boolean"}},
                            "required": ["size", "new"],
                            "additionalProperties": False,
                        }
                    ),
                ),
                lambda text: json.loads(text)["size"] in ("S", "M") and isinstance(json.loads(text)["new"], bool),
            ),
            (Structured("grammar", 'start: "yes" | "no" " please"'), lambda text: text in ("yes", "no please")),
        ],
        ids=["choice", "regex", "json_schema", "grammar"],
    )
    async def test_structured(self, engine: Engine, structured: Structured, fits: Any) -> None:
        """An answer with a constraint fits it and then ends."""
        reply = await ask(engine, "Answer:", structured=structured, max_tokens=100)
        assert fits(reply.text), reply.text
        assert reply.finish == "stop"

    @pytest.mark.parametrize(
        ("field", "sampling"),
        [
            ("sampling.stop_token_ids", {"stop_token_ids": (1, 10**6)}),
            ("sampling.logit_bias", {"logit_bias": {10**6: 1.0}}),
            ("sampling.structured.json_schema", {"structured": Structured("json_schema", "{")}),
            ("sampling.structured.json_schema", {"structured": Structured("json_schema", "[1]")}),
            ("sampling.structured.json_schema", {"structured": Structured("json_schema", '{"type": "nonsense"}')}),
            ("sampling.structured.json_schema", {"structured": Structured("json_schema", "[" * 100_000)}),
            ("sampling.structured.regex", {"structured": Structured("regex", "[a-")}),
            ("sampling.structured.regex", {"structured": Structured("regex", "(a")}),
            ("sampling.structured.grammar", {"structured": Structured("grammar", "start: undefined_rule")}),
            ("sampling.structured.grammar", {"structured": Structured("grammar", "%%%")}),
        ],
    )
    async def test_check_refuses(self, engine: Engine, field: str, sampling: dict[str, Any]) -> None:
        """What the engine would choke on is refused before it sees it, naming the field."""
        with pytest.raises(InvalidRequest) as refusal:
            engine.check(Sampling(max_tokens=8, **sampling))
        assert refusal.value.violations[0][0] == field
        assert len(refusal.value.message) < 500

    async def test_leaving_early(self, engine: Engine) -> None:
        """Closing the iterator frees the request."""
        request = await request_for(engine, "Go on and on", max_tokens=engine.info.context_length // 2, ignore_eos=True)
        async with aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                break
        await until_nothing_runs(engine)
        assert engine.load_now().kv_cache_usage == 0

    async def test_cancelling(self, engine: Engine) -> None:
        """Cancelling the task that reads frees the request too."""
        most = engine.info.context_length // 2
        task = asyncio.create_task(ask(engine, "Go on and on", max_tokens=most, ignore_eos=True))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until_nothing_runs(engine)

    async def test_own_adapter_only(
        self, engine: Engine, adapters: tuple[LoadedAdapter, LoadedAdapter], question: str
    ) -> None:
        """In one batch, two adapters and the base each answer as they do alone."""
        askers = [None, *adapters]
        async with loaded(engine, *adapters):
            alone = [(await ask(engine, question, who, max_tokens=6)).tokens for who in askers]
            together = (ask(engine, question, who, max_tokens=6) for _ in range(3) for who in askers)
            mixed = [reply.tokens for reply in await asyncio.gather(*together)]
        assert len({tuple(tokens) for tokens in alone}) == 3
        assert mixed == alone * 3

    async def test_unload_and_load_again(
        self, engine: Engine, adapters: tuple[LoadedAdapter, LoadedAdapter], question: str
    ) -> None:
        """An adapter that comes back under another id answers as before, and the other one never notices."""
        first, second = adapters
        back = replace(first, id=first.id + 10_000, name=f"{first.name}-back")
        async with loaded(engine, second):
            async with loaded(engine, first):
                before, others = [await ask(engine, question, who, max_tokens=6) for who in adapters]
            assert (await ask(engine, question, second, max_tokens=6)).tokens == others.tokens
            async with loaded(engine, back):
                assert (await ask(engine, question, back, max_tokens=6)).tokens == before.tokens

    async def test_adapter_without_files(self, engine: Engine, tmp_path: Path) -> None:
        """A folder that is not there is refused, and the engine lives."""
        with pytest.raises(InvalidAdapter):
            await engine.load_adapter(LoadedAdapter(99_999, "ghost@v1#0", tmp_path / "nowhere", 8))
        assert engine.alive
        assert (await ask(engine, "Hello", max_tokens=1)).tokens

    async def test_prepare(
        self, engine: Engine, adapters: tuple[LoadedAdapter, LoadedAdapter], question: str, tmp_path: Path
    ) -> None:
        """What is prepared in a thread is the same each time, and answers as the published files do."""
        first, targets = adapters[0], [tmp_path / "once", tmp_path / "again"]
        files = {name: (first.folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        for target in targets:
            await asyncio.to_thread(engine.prepare, files, target)
        alike = (
            targets[0].read_bytes() == targets[1].read_bytes()
        )  # not in the assertion, which would compare megabytes
        assert alike
        async with loaded(engine, first):
            read = await ask(engine, question, first, max_tokens=6)
        copied = replace(first, id=first.id + 20_000, name=f"{first.name}-prepared", prepared=targets[0])
        async with loaded(engine, copied):
            assert (await ask(engine, question, copied, max_tokens=6)).tokens == read.tokens

    async def test_chat(self, engine: Engine) -> None:
        """A conversation becomes more tokens than its text: the template's are added."""
        plain = await engine.encode("Hello")
        chat = await engine.encode_chat([("user", "Hello")])
        assert len(chat) > len(plain)
        assert await engine.encode_chat([("system", "Be brief."), ("user", "Hello")]) != chat

    @pytest.mark.parametrize(
        "turns",
        [
            [("assistant", "I begin"), ("user", "Do you?")],
            [("system", "Only this")],
            [("user", "One"), ("user", "Two")],
            [("user", "One"), ("system", "Late"), ("assistant", "")],
            [("user", "")],
            [("user", "{{ 7 * 7 }} {% raw %} <|im_start|>")],
        ],
    )
    async def test_unusual_conversations(self, engine: Engine, turns: list[Any]) -> None:
        """A conversation in an unusual order is rendered, or refused as the caller's mistake."""
        try:
            ids = await engine.encode_chat(turns)
        except InvalidRequest:
            return
        assert ids
        assert max(ids) < engine.info.vocabulary_size
