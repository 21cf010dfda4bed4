"""The narrow interface between Loraplex and whatever computes tokens: vLLM, or the fake engine of the tests.

One shared suite (tests/engine_suite.py) holds every implementation to the behaviour that is written here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as the engine knows it: `id` and `name` belong to one content digest for the engine's whole life.

    `name` is the version's reference, "#", and the beginning of its digest; `folder` has its published files. `prepared` is
    what the engine's own `prepare` wrote; without it, the engine reads the folder.
    """

    id: int
    name: str
    folder: Path
    rank: int
    prepared: Path | None = None

    @property
    def ref(self) -> str:
        """The version, as people name it: "support@v2"."""
        return self.name.partition("#")[0]


@dataclass(frozen=True)
class Structured:
    """The shape that an answer must have; `value` is the schema, regex or grammar text, or the tuple of choices."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    value: str | tuple[str, ...]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; every field is already within its bounds. max_tokens None: as many as fit, up to 128."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    structured: Structured | None = None


@dataclass(frozen=True)
class Resume:
    """An answer that began elsewhere: its tokens so far, and how many characters of its text have been delivered.

    The engine goes on after them, and counts them as this answer's own in whatever it does.
    """

    token_ids: tuple[int, ...]
    text_length: int


@dataclass(frozen=True)
class EngineRequest:
    """What the engine is asked. `id` is ours and unique; `adapter` None means the base model.

    `sampling.max_tokens` is set. `on_restart` is called when the engine died and the answer begins again: forget all deltas so
    far. None: they cannot be taken back. With `resume`, `sampling.n` is 1, `max_tokens` and `min_tokens` count the whole
    answer, and no prompt log probabilities come. Requests with different `cache_salt` share no cached prefixes.
    `trace` is the traceparent for the engine's own spans, if it makes any.
    """

    id: str
    prompt_token_ids: Sequence[int]
    sampling: Sampling
    adapter: LoadedAdapter | None = None
    on_restart: Callable[[], None] | None = None
    resume: Resume | None = None
    cache_salt: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Logprob:
    """A token and its natural log probability."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True)
class PositionLogprobs:
    """The token at one place and the likeliest ones there, likeliest first."""

    token: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True)
class Delta:
    """The next tokens of answer `index`. `finish_reason` is set on that answer's last delta only.

    `prompt_logprobs` comes with the request's first delta if it was asked for: one entry per prompt token after the first.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """What the engine is: sizes in tokens, how many adapters fit into it at once, and the precision that it computes in."""

    description: str
    context_length: int
    vocabulary_size: int
    slots: int
    dtype: str


@dataclass(frozen=True)
class EngineLoad:
    """What the engine is doing now; `kv_cache_usage` is a share, 0 to 1."""

    running: int
    kv_cache_usage: float


ChatTurn = tuple[Literal["system", "user", "assistant"], str]


class Engine(Protocol):
    """Computes tokens for one base model and the adapters that were loaded into it."""

    async def start(self) -> None:
        """Load the base model; return when the engine can generate. May be called again after `stop`: a new engine.

        Raises BaseModelIncomplete or BaseModelNotFound.
        """
        ...

    async def stop(self) -> None:
        """Stop everything; harmless when called twice or before `start`."""
        ...

    @property
    def info(self) -> EngineInfo:
        """What the engine is; valid after `start`."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine can generate; once false, only another `start` changes that."""
        ...

    @property
    def steps(self) -> int:
        """Counts up as long as the engine works; if it stands still while requests run, the engine hangs."""
        ...

    def load_now(self) -> EngineLoad:
        """What the engine is doing."""
        ...

    async def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ...

    async def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """Token ids of a conversation, rendered by the chat template and ready for the assistant's answer.

        Raises InvalidRequest when the base has no chat template or the template refuses the conversation.
        """
        ...

    def check(self, sampling: Sampling) -> None:
        """Raise InvalidRequest when the engine would refuse `sampling`: unknown token ids, a broken schema or regex."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Answer `request`, delta by delta. Closing the iterator frees all that the request holds in the engine.

        Every token comes exactly once and in order. Raises EngineDied, and NotFinite as soon as a number is NaN.
        """
        ...

    def prepare(self, files: Mapping[str, bytes], target: Path) -> None:
        """Write the file `target` from an adapter's published files, so that `load_adapter` has only to copy.

        Takes a while and is called in a thread; valid after the first `start`, also while the engine is stopped. The same files
        give the same target in every life of the engine. Raises InvalidAdapter, and OSError when the target cannot be written.
        """
        ...

    async def load_adapter(self, adapter: LoadedAdapter, replaced: LoadedAdapter | None = None) -> None:
        """Load an adapter in the place of one that no request uses. Requests may name it once this returns.

        `replaced` is gone whatever happens. Raises InvalidAdapter when the engine refuses the new one.
        """
        ...

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter that no request uses."""
        ...
