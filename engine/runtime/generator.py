"""One request's way through the runtime: name, prompt, place, adapter, engine, and its tokens straight back."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from engine.errors import AdapterLost, InvalidRequest, LoraplexError, NotFinite, OtherVersion
from engine.registry.catalog import Catalog, Route, Side
from engine.registry.manifest import Manifest
from engine.registry.names import AdapterRef
from engine.runtime.admission import ANONYMOUS, Admission, Asked, Place
from engine.runtime.allowance import Allowance, Allowances, unlimited
from engine.runtime.engine import ChatTurn, Delta, Engine, EngineRequest, Resume, Sampling
from engine.runtime.grammars import Grammars
from engine.runtime.residency import Residency
from engine.runtime.shadow import Answered, Copied, Shadows
from engine.runtime.tokens import check_ids

DEFAULT_MAX_TOKENS = 128
NO_ROUTE = Route(None)  # the base model


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


class Generator:
    """Answers requests with one engine, its resident adapters and a bounded queue."""

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        admission: Admission,
        residency: Residency,
        observers: Sequence[Observer] = (),
        shadows: Shadows | None = None,
        allowances: Allowances = unlimited,
    ) -> None:
        self._allowances = allowances
        self._observers = observers
        self._shadows = shadows
        self.engine = engine
        self.catalog = catalog
        self.admission = admission
        self.residency = residency
        admission.follow(residency)
        residency.on_change = admission.wake
        admission.on_upcoming = residency.load_ahead
        self.grammars = Grammars()
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def answer(self, request: GenerationRequest) -> AsyncIterator[tuple[Answer, AsyncIterator[Delta]]]:
        """Answer `request`: what is known about it at once, and its deltas. Leaving the block frees everything.

        The version is resolved here, once: an alias that moves later changes nothing for this request.
        """
        allowance = self._allowances(request.tenant)
        request = _allowed(request, allowance)  # before it counts: who asked for too much may ask for less
        with allowance.entered(goes_on=request.begun is not None):
            async with self._answer(request, allowance) as answer_and_deltas:
                yield answer_and_deltas

    @asynccontextmanager
    async def _answer(
        self, request: GenerationRequest, allowance: Allowance
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[Delta]]]:
        arrived = time.monotonic()
        route = self.catalog.route(request.adapter, request.routing_key) if request.adapter else NO_ROUTE
        if route.manifest:
            self.residency.check_base(route.manifest)
        await self._check(request.sampling)
        ids = await self.encode(request.prompt)
        sampling = self._fit(request.sampling, len(ids), allowance.max_tokens)
        answer = Answer(route.manifest, len(ids), sampling.n, arrived, request.tenant, route.side)
        if request.begun:
            self._check_begun(request.begun, route.manifest, sampling)
            answer.resumed = len(request.begun.resume.token_ids)
        copied = self._shadows if route.shadow and not request.begun else None
        if copied:
            answer.tokens = []
        with self._observed(answer), self.residency.expected(route.manifest):
            if route.manifest:
                self.residency.check_quarantine(route.manifest)
            async with self._answered(request, answer, ids, sampling, allowance) as deltas:
                yield answer, deltas
        if copied and route.shadow and route.manifest and answer.finished == answer.answers:
            asked = Copied(ids, sampling, allowance.cache_salt)
            copied.copy(route.shadow, route.manifest, _answered(answer), asked)

    @asynccontextmanager
    async def _answered(
        self, request: GenerationRequest, answer: Answer, ids: list[int], sampling: Sampling, allowance: Allowance
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """The deltas, once there is a place and the adapter is in it."""
        manifest, arrived = answer.manifest, answer.arrived
        async with self.admission.place(_asked(request, answer, sampling)) as place:
            answer.queue_s = time.monotonic() - arrived
            answer.admitted = True
            # All that the engine reads: also the answer's beginning, which another server charged for when it was said.
            # Each counts for itself, so here it is charged once, and comes to what the whole answer would have cost here.
            allowance.spend(answer.prompt_tokens + answer.resumed)
            async with self.residency.lease(manifest) if manifest else nullcontext() as lease:
                answer.adapter_wait_s = lease.waited_s if lease else 0.0
                adapter = lease.adapter if lease else None
                engine_request = EngineRequest(
                    f"g{next(self._numbers)}", ids, sampling, adapter, _on_restart(request, answer, allowance),
                    request.begun.resume if request.begun else None, allowance.cache_salt, request.trace,
                )  # fmt: skip
                async with aclosing(self._run(answer, place, engine_request, allowance)) as deltas:
                    yield deltas

    @contextmanager
    def _observed(self, answer: Answer) -> Iterator[None]:
        """Tell the observers of a request and of its end; what the caller did wrong ended before."""
        ending = Ending()
        for observer in self._observers:
            observer.began(answer)
        try:
            yield
        except LoraplexError as error:
            ending = Ending(error.status, error.reason)
            raise
        except Exception:
            ending = Ending("INTERNAL")
            raise
        except BaseException:  # the caller has left
            ending = Ending("CANCELLED")
            raise
        finally:
            for observer in self._observers:
                observer.ended(answer, ending)

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises InvalidRequest when it is empty or not of this vocabulary."""
        if prompt.token_ids is not None:
            check_ids("token_ids.ids", prompt.token_ids, self.engine.info.vocabulary_size)
            return list(prompt.token_ids)
        if prompt.chat is not None:
            return await self.engine.encode_chat(prompt.chat)
        ids = await self.engine.encode(prompt.text or "")
        if not ids:
            raise InvalidRequest("text", "is empty: give at least one token")
        return ids

    async def _check(self, sampling: Sampling) -> None:
        # The engine would check the structure too, but here and now, where nothing can stop it.
        self.engine.check(replace(sampling, structured=None))
        if sampling.structured:
            await self.grammars.check(sampling.structured)

    def _check_begun(self, begun: Begun, manifest: Manifest | None, sampling: Sampling) -> None:
        """Raise OtherVersion or InvalidRequest if this is not the one to go on, or there is nothing to go on with."""
        here = (manifest.digest if manifest else "", self.residency.base_fingerprint)
        if (begun.digest, begun.base_fingerprint) != here:
            raise OtherVersion(manifest.ref if manifest else "the base model")
        ids = begun.resume.token_ids
        check_ids("resume.token_ids", ids, self.engine.info.vocabulary_size)
        if sampling.n != 1:
            raise InvalidRequest("resume", "needs n of 1: one answer is resumed at a time")
        if len(ids) >= (sampling.max_tokens or 0):
            raise InvalidRequest("resume.token_ids", f"has {len(ids)} tokens, all of max_tokens {sampling.max_tokens}")

    def _fit(self, sampling: Sampling, prompt_tokens: int, most: int | None) -> Sampling:
        """Settle max_tokens, at `most` if none is given, or raise InvalidRequest when prompt and answer cannot fit."""
        context = self.engine.info.context_length
        room = context - prompt_tokens
        if room < 1:
            raise InvalidRequest(
                "prompt", f"has {prompt_tokens} tokens; the context length is {context}, answer included"
            )
        usual = min(DEFAULT_MAX_TOKENS, room, most or DEFAULT_MAX_TOKENS)
        wanted = sampling.max_tokens or max(usual, sampling.min_tokens)
        if wanted > room:
            raise InvalidRequest(
                "sampling.max_tokens",
                f"{wanted} and a prompt of {prompt_tokens} tokens are above the context length {context}; "
                f"at most {room} fit",
            )
        return replace(sampling, max_tokens=wanted)

    async def _run(
        self, answer: Answer, place: Place, request: EngineRequest, allowance: Allowance
    ) -> AsyncGenerator[Delta, None]:
        try:
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    answer.count(delta)
                    place.served(len(delta.token_ids))
                    allowance.spend(len(delta.token_ids))
                    yield delta
        except (NotFinite, AdapterLost) as error:
            if answer.manifest is None:
                raise
            if isinstance(error, NotFinite):
                self.residency.quarantine(answer.manifest)
            raise type(error)(answer.manifest.ref) from error  # the engine may know the same bytes by another's name


def _allowed(request: GenerationRequest, allowance: Allowance) -> GenerationRequest:
    """The request as its tenant may make it. Raises InvalidRequest if it may not."""
    if request.begun and allowance.max_priority is not None:
        # A router asks for an answer's rest with the highest priority, and does not know what the tenant's is.
        request = replace(request, priority=min(request.priority, allowance.max_priority))
    tokens = request.sampling.max_tokens or request.sampling.min_tokens
    for field, asked, most in (
        ("priority", request.priority, allowance.max_priority),
        ("sampling.max_tokens", tokens, allowance.max_tokens),
    ):
        if most is not None and asked > most:
            raise InvalidRequest(field, f"{asked} is above the {most} that the policy allows the tenant")
    return request


def _answered(answer: Answer) -> Answered:
    """The answer as a shadow's is: without what it waited for."""
    waited = answer.waited_s
    return Answered(answer.tokens or (), answer.first_token_s - waited, answer.total_s - waited)


def _on_restart(request: GenerationRequest, answer: Answer, allowance: Allowance) -> Callable[[], None] | None:
    forget = request.on_restart
    if forget is None:
        return None

    def begin_again() -> None:
        allowance.spend(-answer.completion_tokens)  # the tenant pays for the answer that it gets
        answer.begin_again()
        forget()

    return begin_again


def _asked(request: GenerationRequest, answer: Answer, sampling: Sampling) -> Asked:
    return Asked(
        tenant=request.tenant,
        adapter=answer.manifest.digest if answer.manifest else None,
        priority=request.priority,
        places=sampling.n,
        prompt_tokens=answer.prompt_tokens + answer.resumed,
        min_tokens=max(0, sampling.min_tokens - answer.resumed),
        max_tokens=(sampling.max_tokens or 1) - answer.resumed,
        deadline=request.deadline,
    )
