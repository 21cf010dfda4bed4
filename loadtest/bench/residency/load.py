"""Callers that each send their next request when the last one is answered, watched through a window of time."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loadtest.bench.callers import Backend, Request, answer
from loadtest.bench.samples import Sample, interpolated_percentile
from loadtest.plan.prompts import random_prompt

PROMPT_WORDS, ANSWER = 48, (8, 24)  # about what the adapters in examples/ are asked, and say


@dataclass(frozen=True)
class Group:
    """Callers who do the same: how many, whom they ask, and how popular each of those is (Zipf's exponent; 0: alike)."""

    backend: Backend
    callers: int
    adapters: Sequence[str]
    exponent: float = 0.0
    answers: tuple[int, int] = ANSWER  # tokens, from and to
    prompt_words: int = PROMPT_WORDS

    def requests(self, seed: int) -> Iterator[Request]:
        """Requests without end; the same seed gives the same ones."""
        rng = random.Random(seed)
        weights = [1 / rank**self.exponent for rank in range(1, len(self.adapters) + 1)]
        while True:
            (adapter,) = rng.choices(self.adapters, weights)
            prompt = random_prompt(rng, self.prompt_words)
            yield Request(prompt, rng.randint(*self.answers), adapter)


@dataclass
class Window:
    """What a group's requests did between two moments; `ttfts` and `gaps` in milliseconds, of all tokens that came then."""

    seconds: float = 0.0
    tokens: int = 0
    ttfts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers in a second."""
        return self.tokens / self.seconds

    def ttft(self, percent: int) -> float:
        """A percentile of the times to first token, in milliseconds."""
        return interpolated_percentile(self.ttfts, percent)

    def gap(self, percent: int) -> float:
        """A percentile of the gaps between an answer's tokens, in milliseconds."""
        return interpolated_percentile(self.gaps, percent)


def window(samples: Sequence[Sample], began: float, ended: float) -> Window:
    """Cut the window out of what was seen."""
    cut = Window(ended - began)
    for sample in samples:
        if sample.error:
            cut.errors.append(sample.error)
        times = sample.token_times
        cut.tokens += sum(began <= at < ended for at in times)
        if times and began <= times[0] < ended:
            cut.ttfts.append(1000 * sample.ttft_s)
        cut.gaps += [
            1000 * (after - before) for before, after in itertools.pairwise(times) if began <= before and after < ended
        ]
    return cut


@asynccontextmanager
async def calling(groups: Sequence[Group], seed: int) -> AsyncIterator[list[list[Sample]]]:
    """Callers at work for the time of the block; gives each group's answers so far."""
    seen: list[list[Sample]] = [[] for _ in groups]

    async def call(group: Group, samples: list[Sample], number: int) -> None:
        for request in group.requests(seed * 10_007 + number):
            samples.append(sample := Sample())
            await answer(group.backend, request, sample)
            if sample.error:
                await asyncio.sleep(0.1)  # whoever refuses at once is not asked all the time

    tasks = [
        asyncio.create_task(call(group, samples, 1000 * which + number))
        for which, (group, samples) in enumerate(zip(groups, seen, strict=True))
        for number in range(group.callers)
    ]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def watch(
    groups: Sequence[Group],
    seconds: float,
    settle_s: float,
    seed: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Window]:
    """Let the groups call for `settle_s`, then for `seconds` more, which are the window; one for each group."""
    async with calling(groups, seed) as seen:
        await asyncio.sleep(settle_s)
        began = clock()
        await asyncio.sleep(seconds)
        ended = clock()
        return [window(samples, began, ended) for samples in seen]
