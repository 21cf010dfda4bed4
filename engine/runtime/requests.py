"""A request as the runtime knows it, the answer on its way, and who hears of both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.registry.catalog import Side
from engine.registry.manifest import Manifest
from engine.registry.names import AdapterRef
from engine.runtime.admission import ANONYMOUS
from engine.runtime.engine import ChatTurn, Delta, Resume, Sampling


@dataclass(frozen=True)
class Prompt:
    """A prompt in exactly one of its three forms."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    chat: Sequence[ChatTurn] | None = None


@dataclass(frozen=True)
class Begun:
    """An answer to go on with, and who began it: a version's digest ("" for the base model) and a base's fingerprint."""

    resume: Resume
    digest: str
    base_fingerprint: str


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks; `adapter` None means the base model, and a higher `priority` goes first among its tenant's.

    `deadline` is a time on time.monotonic's clock after which nobody waits for the answer. The same `routing_key` always gets
    the same side of a canary. `on_restart` is for who has not passed any delta on: it is called when the engine died and all of
    them come again. `trace` is a traceparent (https://www.w3.org/TR/trace-context).
    """

    prompt: Prompt
    sampling: Sampling
    adapter: AdapterRef | None = None
    priority: int = 0
    tenant: str = ANONYMOUS
    deadline: float = math.inf
    routing_key: str = ""
    on_restart: Callable[[], None] | None = None
    begun: Begun | None = None
    trace: str = ""


@dataclass
class Answer:
    """A request on its way; times are in seconds from its arrival, and complete once `deltas` is exhausted.

    `resumed` tokens came from elsewhere before; `completion_tokens` are those that came here.
    """

    manifest: Manifest | None
    prompt_tokens: int
    answers: int
    arrived: float
    tenant: str = ANONYMOUS
    side: Side | None = None
    admitted: bool = False
    queue_s: float = 0.0
    adapter_wait_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    tokens: list[int] | None = None  # of the first answer, if they are to be remembered
    resumed: int = 0

    @property
    def waited_s(self) -> float:
        """How long it waited for a place and for its adapter: nothing that its version could help."""
        return self.queue_s + self.adapter_wait_s

    def begin_again(self) -> None:
        """Forget what was counted: the answer starts again."""
        self.completion_tokens = self.cached_tokens = self.finished = 0
        if self.tokens:
            self.tokens.clear()

    def count(self, delta: Delta) -> None:
        """Add a delta to the sums."""
        now = time.monotonic() - self.arrived
        if not self.completion_tokens:
            self.first_token_s = now
        self.total_s = now
        self.completion_tokens += len(delta.token_ids)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.finished += delta.finish_reason is not None
        if self.tokens is not None and delta.index == 0:
            self.tokens += delta.token_ids


@dataclass(frozen=True)
class Ending:
    """How a request ended: its gRPC status by name, and the `reason` of an error of ours."""

    code: str = "OK"
    reason: str = ""


class Observer(Protocol):
    """Hears of every request but those that were malformed or named what is not there."""

    def began(self, answer: Answer) -> None:
        """A request waits for its place; `answer` tells later on how far it is."""

    def ended(self, answer: Answer, ending: Ending) -> None:
        """It has ended."""
