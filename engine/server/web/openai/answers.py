"""Our answers as OpenAI's: whole ones, and chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from engine.api.loraplex.v1 import generation_pb2 as pb

Json = dict[str, Any]
_FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
_LEAST = -9999.0  # OpenAI's number for a probability of zero, which JSON has no infinity for


def model_name(adapter: pb.ResolvedAdapter, base: str) -> str:
    """Who answered, exactly: the version, whatever alias was asked for."""
    return f"{adapter.name}@{adapter.version}" if adapter.name else base


def headers(adapter: pb.ResolvedAdapter, base: str, request_id: str) -> dict[str, str]:
    """The same for programs that look at headers."""
    found = {
        "x-request-id": request_id,
        "x-loraplex-version": model_name(adapter, base),
        "x-loraplex-base": adapter.base_fingerprint,
    }
    return found | ({"x-loraplex-digest": adapter.digest} if adapter.digest else {})


def usage(parts: Sequence[pb.Usage]) -> Json:
    """Tokens of all prompts together."""
    prompt = sum(part.prompt_tokens for part in parts)
    completion = sum(part.completion_tokens for part in parts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(part.cached_tokens for part in parts)},
    }


class Form:
    """One kind of answer. `head` is what its objects have in common."""

    whole: str
    chunk: str

    def __init__(self, kind: str, identity: str, adapter: pb.ResolvedAdapter, base: str) -> None:
        self.head: Json = {
            "id": identity,
            "object": kind,
            "created": int(time.time()),
            "model": model_name(adapter, base),
            "system_fingerprint": adapter.digest or adapter.base_fingerprint,
        }

    def choice(self, index: int, completion: pb.Completion) -> Json:
        """A whole answer."""
        raise NotImplementedError

    def chunks(self, index: int, delta: pb.GenerateStreamResponse, *, first: bool) -> Iterator[Json]:
        """The choices that tell of a delta; `first` for the first one of its answer."""
        raise NotImplementedError


class ChatForm(Form):
    """The chat's."""

    whole, chunk = "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, completion: pb.Completion) -> Json:
        """A message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": _chat_logprobs(completion.logprobs),
            "finish_reason": _FINISH.get(completion.finish_reason),
        }

    def chunks(self, index: int, delta: pb.GenerateStreamResponse, *, first: bool) -> Iterator[Json]:
        """The role, then text, then why it ended."""
        if first:
            yield _chat_chunk(index, {"role": "assistant", "content": ""})
        if delta.text or delta.logprobs:
            yield _chat_chunk(index, {"content": delta.text}, _chat_logprobs(delta.logprobs))
        if delta.finish_reason:
            yield _chat_chunk(index, {}, finish=_FINISH.get(delta.finish_reason))


class CompletionForm(Form):
    """The completions'. `echoes` are the prompts that answers begin with, each for the next `answers` of them."""

    whole = chunk = "text_completion"

    def __init__(
        self, kind: str, identity: str, adapter: pb.ResolvedAdapter, base: str, echoes: Sequence[str], answers: int
    ) -> None:
        super().__init__(kind, identity, adapter, base)
        self._echoes = echoes
        self._answers = answers
        self._lengths: dict[int, int] = {}  # of each answer's tokens so far, in characters

    def choice(self, index: int, completion: pb.Completion) -> Json:
        """A text."""
        text = self._echo(index) + completion.text
        return self._choice(index, text, completion.logprobs, _FINISH.get(completion.finish_reason))

    def chunks(self, index: int, delta: pb.GenerateStreamResponse, *, first: bool) -> Iterator[Json]:
        """Text, and why it ended."""
        text = (self._echo(index) if first else "") + delta.text
        if text or delta.logprobs or delta.finish_reason:
            yield self._choice(index, text, delta.logprobs, _FINISH.get(delta.finish_reason))

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._answers] if self._echoes else ""

    def _choice(self, index: int, text: str, places: Sequence[pb.TokenLogprobs], finish: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, places), "finish_reason": finish}

    def _logprobs(self, index: int, places: Sequence[pb.TokenLogprobs]) -> Json | None:
        if not places:
            return None
        offsets, at = [], self._lengths.get(index, 0)
        for place in places:
            offsets.append(at)
            at += len(place.token.text)
        self._lengths[index] = at
        return {
            "tokens": [place.token.text for place in places],
            "token_logprobs": [max(place.token.logprob, _LEAST) for place in places],
            "top_logprobs": [{one.text: max(one.logprob, _LEAST) for one in place.top} for place in places],
            "text_offset": offsets,
        }


def _chat_chunk(index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _chat_logprobs(places: Sequence[pb.TokenLogprobs]) -> Json | None:
    if not places:
        return None
    content = [_logprob(place.token) | {"top_logprobs": [_logprob(one) for one in place.top]} for place in places]
    return {"content": content, "refusal": None}


def _logprob(entry: pb.TokenLogprob) -> Json:
    return {"token": entry.text, "logprob": max(entry.logprob, _LEAST), "bytes": list(entry.text.encode())}
