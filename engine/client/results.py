"""From response messages to results: plain frozen objects, times in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.api.loraplex.v1 import generation_pb2 as pb

_FINISH_REASONS: dict[int, str] = {
    pb.FINISH_REASON_UNSPECIFIED: "",
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """Who answered; str() gives "support@v3", or "base" for the base model alone."""

    name: str
    version: str
    digest: str
    base_fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.name else "base"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt, those of them that were cached, and tokens generated (all n answers together)."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds inside the server: waiting for a place, for the adapter, until the first and until the last token."""

    queue_s: float
    adapter_wait_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log probability."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log probability, with the likeliest tokens at its place, likeliest first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the n answers; `finish_reason` is "stop" or "length", `logprobs` is empty unless asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. With n above 1, `text` and the like are the first answer's, and `completions` has them all."""

    completions: tuple[Completion, ...]
    adapter: Adapter
    usage: Usage
    timings: Timings
    request_id: str
    prompt_logprobs: tuple[TokenLogprobs, ...]
    failovers: int = 0
    """How often another replica took over, behind a router."""

    @property
    def text(self) -> str:
        """The first answer's text, without stop strings and special tokens."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first answer's tokens, end token included."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first answer ended: "stop" or "length"."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The first answer's log probabilities, one for each token, if asked for."""
        return self.completions[0].logprobs


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of answer `index`; `text` may be empty while a character is incomplete.

    `finish_reason` is "" until that answer's last chunk; `usage` and `timings` are on the stream's last chunk,
    `prompt_logprobs` (if asked for) on its first, `adapter` and `request_id` on all.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int
    sequence: int
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...]
    adapter: Adapter
    request_id: str
    usage: Usage | None
    timings: Timings | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    failovers: int = 0
    """On the last chunk: how often another replica took over, behind a router."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """A prompt's length in tokens, the most that prompt and answer may have together, and the prompt's tokens."""

    prompt_tokens: int
    context_length: int
    token_ids: tuple[int, ...]


def generation(response: pb.GenerateResponse) -> Generation:
    """The result of Generate."""
    return Generation(
        completions=tuple(
            Completion(
                index=one.index,
                text=one.text,
                token_ids=tuple(one.token_ids),
                finish_reason=_finish_reason(one.finish_reason),
                logprobs=_logprobs(one.logprobs),
            )
            for one in response.completions
        ),
        adapter=adapter(response.adapter),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
        request_id=response.request_id,
        prompt_logprobs=_logprobs(response.prompt_logprobs),
        failovers=response.failovers,
    )


def chunk(message: pb.GenerateStreamResponse, who: Adapter, request_id: str) -> Chunk:
    """One message of GenerateStream; `who` and `request_id` come from the stream's first message."""
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        index=message.index,
        sequence=message.sequence,
        finish_reason=_finish_reason(message.finish_reason),
        logprobs=_logprobs(message.logprobs),
        adapter=who,
        request_id=request_id,
        usage=_usage(message.usage) if message.HasField("usage") else None,
        timings=_timings(message.timings) if message.HasField("timings") else None,
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        failovers=message.failovers,
    )


def adapter(message: pb.ResolvedAdapter) -> Adapter:
    """Who answered."""
    return Adapter(message.name, message.version, message.digest, message.base_fingerprint)


def token_count(response: pb.CountTokensResponse) -> TokenCount:
    """The result of CountTokens."""
    return TokenCount(response.prompt_tokens, response.context_length, tuple(response.token_ids))


def _finish_reason(value: int) -> str:
    return _FINISH_REASONS.get(value, f"reason {value}")  # a newer server may know more reasons


def _usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def _timings(message: pb.Timings) -> Timings:
    return Timings(
        queue_s=message.queue.ToTimedelta().total_seconds(),
        adapter_wait_s=message.adapter_wait.ToTimedelta().total_seconds(),
        time_to_first_token_s=message.time_to_first_token.ToTimedelta().total_seconds(),
        total_s=message.total.ToTimedelta().total_seconds(),
    )


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(_logprob(one.token), tuple(map(_logprob, one.top))) for one in messages)


def _logprob(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, message.text)
