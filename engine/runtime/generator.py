"""One request's way through the runtime: name, prompt, place, adapter, engine, and its tokens straight back."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace

from engine.errors import AdapterLost, InvalidRequest, LoraplexError, NotFinite, OtherVersion
from engine.registry.catalog import Catalog, Route
from engine.registry.manifest import Manifest
from engine.runtime.admission import Admission, Asked, Place
from engine.runtime.allowance import Allowance, Allowances, unlimited
from engine.runtime.engine import Delta, Engine, EngineRequest, Sampling
from engine.runtime.grammars import Grammars
from engine.runtime.requests import Answer, Begun, Ending, GenerationRequest, Observer, Prompt
from engine.runtime.residency import Residency
from engine.runtime.shadow import Answered, Copied, Shadows
from engine.runtime.tokens import check_ids

DEFAULT_MAX_TOKENS = 128
NO_ROUTE = Route(None)  # the base model


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
            async with self._resolved(request, allowance) as answer_and_deltas:
                yield answer_and_deltas

    @asynccontextmanager
    async def _resolved(
        self, request: GenerationRequest, allowance: Allowance
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[Delta]]]:
        """The version that the name means now, and the tokens of the prompt; what cannot be answered is refused."""
        arrived = time.monotonic()
        route = self.catalog.route(request.adapter, request.routing_key) if request.adapter else NO_ROUTE
        if route.manifest:
            self.residency.check_base(route.manifest)
        await self._check(request.sampling, request.tenant)
        ids = await self.encode(request.prompt)
        sampling = self._fit(request.sampling, len(ids), allowance.max_tokens)
        answer = Answer(route.manifest, len(ids), sampling.n, arrived, request.tenant, route.side)
        if request.begun:
            self._check_begun(request.begun, route.manifest, sampling)
            answer.resumed = len(request.begun.resume.token_ids)
        shadows = self._shadows if route.shadow and not request.begun else None
        if shadows:
            answer.tokens = []
        with self._observed(answer), self.residency.expected(route.manifest):
            if route.manifest:
                self.residency.check_quarantine(route.manifest)
            async with self._admitted(request, answer, ids, sampling, allowance) as deltas:
                yield answer, deltas
        if shadows and route.shadow and route.manifest and answer.finished == answer.answers:
            copy = Copied(ids, sampling, allowance.cache_salt)
            shadows.copy(route.shadow, route.manifest, _as_shadows_answer(answer), copy)

    @asynccontextmanager
    async def _admitted(
        self, request: GenerationRequest, answer: Answer, ids: list[int], sampling: Sampling, allowance: Allowance
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """The deltas, once there is a place and the adapter is in it."""
        manifest, arrived = answer.manifest, answer.arrived
        async with self.admission.place(_asked(request, answer, sampling)) as place:
            answer.queue_s = time.monotonic() - arrived
            answer.admitted = True
            # All tokens that are prefilled, a resumed answer's earlier ones included, though another server has charged for
            # them: quotas are counted per server, so the rest of an answer costs here what the whole one would have.
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

    async def _check(self, sampling: Sampling, tenant: str) -> None:
        # The engine would check the structure too, but here and now, where nothing can stop it.
        self.engine.check(replace(sampling, structured=None))
        if sampling.structured:
            await self.grammars.check(sampling.structured, tenant)

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


def _as_shadows_answer(answer: Answer) -> Answered:
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
