"""A fake engine for tests: instant, deterministic, and honest about everything a caller can see.

Tokens are UTF-8 bytes. An answer names who answers and repeats the prompt ("support@v2 heard: hello"), so a test sees at once
when the wrong adapter answered; structured output, stops, penalties' bounds, log probabilities, cancellation and the
context length behave as the real engine's do. `loraplex serve --engine fake` puts it behind the real server.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import itertools
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path

import llguidance
import safetensors

from engine.errors import EngineDied, InvalidAdapter, NotFinite
from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.runtime.engine import (
    ChatTurn,
    Delta,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    LoadedAdapter,
    Logprob,
    PositionLogprobs,
    Resume,
    Sampling,
)
from engine.runtime.structured import to_grammar
from engine.runtime.tokens import check_token_ids

END = 256  # the end token: one above the bytes
VOCABULARY = 257
SLOTS = 1025  # more than any setting asks for


class FakeEngine:
    """Makes answers up, one byte per token, `token_interval_s` seconds apart."""

    def __init__(self, context_length: int = 2048, token_interval_s: float = 0.0, dtype: str = "float32") -> None:
        self.info = EngineInfo("fake", context_length, VOCABULARY, SLOTS, dtype)
        self.token_interval_s = token_interval_s
        self.loaded: dict[int, LoadedAdapter] = {}
        self.running: set[str] = set()
        self.alive = True
        self._started = 0
        self.steps = 0
        self.not_finite: set[str] = set()  # who (base, or a version) gives NaN after two tokens

    async def start(self) -> None:
        """A new engine, which holds no adapter."""
        self.loaded.clear()
        self.alive = True
        self._started += 1

    async def stop(self) -> None:
        """From now on every request fails with EngineDied, as with a real engine that is gone."""
        self.alive = False

    def load_now(self) -> EngineLoad:
        """The number of running requests; the pretended cache has room for 64."""
        return EngineLoad(running=len(self.running), kv_cache_usage=min(1.0, len(self.running) / 64))

    async def encode(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    async def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """One line per turn, then the assistant's."""
        return await self.encode("".join(f"{role}: {content}\n" for role, content in turns) + "assistant:")

    def check(self, sampling: Sampling) -> None:
        """Refuse what the real engine refuses."""
        check_token_ids(sampling, VOCABULARY)
        if sampling.structured:
            to_grammar(sampling.structured)

    def prepare(self, files: Mapping[str, bytes], target: Path) -> None:
        """Nothing to convert: the weights as they are, if they are any."""
        try:
            safetensors.deserialize(files[WEIGHTS])  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise InvalidAdapter("load", WEIGHTS, "cannot be read", fix="Publish it as PEFT saves it.") from error
        target.write_bytes(files[WEIGHTS])

    async def load_adapter(self, adapter: LoadedAdapter, replaced: LoadedAdapter | None = None) -> None:
        """Remember the adapter."""
        if replaced:
            self.loaded.pop(replaced.id, None)
        there = adapter.prepared or adapter.folder / CONFIG
        if not there.is_file():
            raise InvalidAdapter("load", adapter.ref, "its folder is not there", fix="Load it again.")
        self.loaded[adapter.id] = adapter

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Forget the adapter."""
        self.loaded.pop(adapter.id, None)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Answer byte by byte, the n answers in turn."""
        if request.adapter is not None and request.adapter.id not in self.loaded:
            self.alive = False  # what happens to a real engine that must load an adapter inside its step
        self.running.add(request.id)
        started = self._started
        try:
            answers = [_Answer(request, index) for index in range(request.sampling.n)]
            if request.resume:
                answers[0].catch_up(request.resume)
            for turn in itertools.count():
                if not self.alive or started != self._started:  # whoever restarts it does not bring answers back
                    raise EngineDied
                if turn == 2 and _who(request) in self.not_finite:
                    raise NotFinite(_who(request))
                await asyncio.sleep(self.token_interval_s)
                self.steps += 1
                going = [answer for answer in answers if not answer.finished]
                if not going:
                    return
                for answer in going:
                    yield answer.step(first=turn == 0 and answer.index == 0 and not request.resume)
        finally:
            self.running.discard(request.id)


class _Answer:
    """One of a request's n answers on its way."""

    def __init__(self, request: EngineRequest, index: int) -> None:
        self.index = index
        self.finished = False
        self._request = request
        self._sampling = request.sampling
        self._tokens: list[int] = []
        self._wanted = self._structured() if self._sampling.structured else self._spoken()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text that may still turn out to be the beginning of a stop string

    def catch_up(self, resume: Resume) -> None:
        """Say again, to nobody, what was said before; the next step's text begins after what was delivered of it."""
        said = "".join(self.step(first=False, token=token).text for token in resume.token_ids)
        self._held = (said + self._held)[resume.text_length :]

    def step(self, *, first: bool, token: int | None = None) -> Delta:
        """The next token, or this one, whatever would have been next."""
        wanted = next(self._wanted)
        token = wanted if token is None else token
        self._tokens.append(token)
        reason = self._reason(token)
        text = self._text(token, reason)
        if text is None:
            reason, text = "stop", self._cut_at_stop()
        self.finished = reason is not None
        sampling = self._sampling
        return Delta(
            index=self.index,
            text=text,
            token_ids=(token,),
            finish_reason=reason,
            logprobs=()
            if sampling.logprobs is None
            else (self._logprobs(token, len(self._tokens), sampling.logprobs),),
            prompt_logprobs=self._prompt_logprobs() if first else (),
        )

    def _reason(self, token: int) -> FinishReason | None:
        sampling = self._sampling
        enough = len(self._tokens) > sampling.min_tokens
        if enough and ((token == END and not sampling.ignore_eos) or token in sampling.stop_token_ids):
            return "stop"
        return "length" if len(self._tokens) == sampling.max_tokens else None

    def _text(self, token: int, reason: FinishReason | None) -> str | None:
        """New text that no stop string can swallow any more; None when a stop string has appeared."""
        final = reason is not None
        silent = token == END or (reason == "stop" and token in self._sampling.stop_token_ids)
        self._held += self._decoder.decode(b"" if silent else bytes([token]), final)
        stops = self._sampling.stop
        if len(self._tokens) > self._sampling.min_tokens and any(stop in self._held for stop in stops):
            return None
        hold = 0 if final else max(map(len, stops), default=1) - 1
        ready = len(self._held) - hold if hold else len(self._held)
        text, self._held = self._held[: max(ready, 0)], self._held[max(ready, 0) :]
        return text

    def _cut_at_stop(self) -> str:
        return self._held[: min(at for stop in self._sampling.stop if (at := self._held.find(stop)) >= 0)]

    def _spoken(self) -> Iterator[int]:
        """'<who> heard: <prompt>', then the end token; again and again where the end token does not count."""
        who = _who(self._request)
        prompt = bytes(token for token in self._request.prompt_token_ids if token < END)
        words = f"{who} heard: ".encode() + prompt + self._chance()
        while True:
            yield from words
            if len(self._tokens) >= self._sampling.min_tokens and not self._sampling.ignore_eos:
                yield END

    def _chance(self) -> bytes:
        """Nothing when greedy; else a few letters that depend on the seed, or on nothing that could be repeated."""
        if self._sampling.temperature == 0:
            return b""
        seed = self._request.id if self._sampling.seed is None else self._sampling.seed
        return b" " + hashlib.sha256(f"{seed}/{self.index}".encode()).hexdigest()[:8].encode()

    def _structured(self) -> Iterator[int]:
        """Bytes that the grammar allows: the end as soon as it may come, printable characters otherwise."""
        structured = self._sampling.structured
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), to_grammar(structured) if structured else "")
        while not matcher.is_stopped():
            allowed = matcher.compute_logit_bias()
            choices = [token for token in range(END) if allowed[token]]
            if matcher.is_accepting() or not choices:
                break
            token = self._prefer(choices)
            matcher.consume_token(token)
            yield token
        while True:
            yield END

    def _prefer(self, choices: list[int]) -> int:
        closing = [token for token in b'"}]' if token in choices]
        printable = [token for token in choices if 32 < token < 127] or choices
        if closing and self._hash(len(self._tokens)) % 3 == 0:
            return closing[0]
        return printable[self._hash(len(self._tokens)) % len(printable)]

    def _hash(self, position: int) -> int:
        adapter = self._request.adapter
        seed = (adapter.name if adapter else "", bytes(t % 256 for t in self._request.prompt_token_ids), position)
        return int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:4], "big")

    def _logprobs(self, token: int, position: int, count: int) -> PositionLogprobs:
        """The chosen token first, then neighbours, each less likely."""
        start = -0.01 - (self._hash(position) % 1000) / 1000
        ids = [token, *((token + step) % VOCABULARY for step in range(1, count))][: max(count, 0)]
        top = tuple(_logprob(each, start - rank) for rank, each in enumerate(ids))
        return PositionLogprobs(_logprob(token, start), top)

    def _prompt_logprobs(self) -> tuple[PositionLogprobs, ...]:
        count = self._sampling.prompt_logprobs
        if count is None:
            return ()
        ids = self._request.prompt_token_ids
        return tuple(self._logprobs(ids[at], -at, count) for at in range(1, len(ids)))


def _who(request: EngineRequest) -> str:
    return request.adapter.ref if request.adapter else "base"


def _logprob(token: int, value: float) -> Logprob:
    return Logprob(token, value, "" if token == END else bytes([token]).decode(errors="replace"))
