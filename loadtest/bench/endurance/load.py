"""Requests at a rate (Poisson, whatever the answers do), and what became of each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.client import AsyncClient, RequestError
from loadtest.bench.samples import interpolated_percentile
from loadtest.plan.prompts import random_prompt

_PROMPT_WORDS, _ANSWER = 24, (8, 24)
_MOST_OPEN = 4000  # calls of ours at once, so that the client is not what breaks


@dataclass(frozen=True)
class Outcome:
    """One request: when it was sent and ended (monotonic seconds), and how. `first_s` is its time to first token."""

    sent: float
    ended: float
    code: str
    first_s: float = 0.0
    tokens: int = 0
    hint: bool = False  # the refusal said when to come again

    @property
    def good(self) -> bool:
        """Answered, within its deadline."""
        return self.code == "OK"


class Load:
    """Callers of one server, each request for one of `adapters` ("": the base)."""

    def __init__(self, client: AsyncClient, adapters: Sequence[str], deadline_s: float, seed: int = 1) -> None:
        self._client = client
        self._adapters = adapters
        self._deadline_s = deadline_s
        self._dice = random.Random(seed)

    async def at_rate(self, per_s: float, seconds: float) -> list[Outcome]:
        """Send for so long, at times that no answer changes; returns when the last one has ended."""
        tasks: list[asyncio.Task[Outcome]] = []
        began = due = time.monotonic()
        while (due := due + self._dice.expovariate(per_s)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if sum(not task.done() for task in tasks[-_MOST_OPEN:]) < _MOST_OPEN:
                tasks.append(asyncio.create_task(self.one()))
        return list(await asyncio.gather(*tasks))

    async def closed(self, callers: int, seconds: float) -> list[Outcome]:
        """So many callers who each wait for their answer before they ask again."""
        until = time.monotonic() + seconds
        seen: list[Outcome] = []

        async def call() -> None:
            while time.monotonic() < until:
                seen.append(await self.one())

        await asyncio.gather(*(call() for _ in range(callers)))
        return [outcome for outcome in seen if outcome.ended <= until]

    def tokens(self, count: int) -> list[int]:
        """A prompt of so many tokens that is like no other."""
        return [self._dice.randrange(1000) for _ in range(count)]

    async def one(self) -> Outcome:
        """Ask once."""
        sent, first, tokens = time.monotonic(), 0.0, 0
        prompt = random_prompt(self._dice, _PROMPT_WORDS)
        wanted, adapter = self._dice.randint(*_ANSWER), self._dice.choice(self._adapters)
        try:
            async for chunk in self._client.stream(
                adapter=adapter, prompt=prompt, max_tokens=wanted, ignore_eos=True, timeout_s=self._deadline_s
            ):
                first = first or time.monotonic() - sent
                tokens += len(chunk.token_ids)
        except RequestError as error:
            return Outcome(sent, time.monotonic(), error.code.name, first, tokens, error.retry_after_s is not None)
        return Outcome(sent, time.monotonic(), "OK", first, tokens)


def goodput(outcomes: Sequence[Outcome], seconds: float) -> float:
    """Good answers a second."""
    return sum(outcome.good for outcome in outcomes) / seconds


def ttft_p95(outcomes: Sequence[Outcome]) -> float:
    """Seconds; infinite if nothing was answered."""
    return interpolated_percentile([outcome.first_s for outcome in outcomes if outcome.good], 95)
