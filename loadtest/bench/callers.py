"""What is asked, and how: a fixed number of callers, each sending its next request when its last one is answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from loadtest.bench.samples import Sample
from loadtest.plan.prompts import random_prompt


@dataclass(frozen=True)
class Request:
    """A request: greedy, and exactly `max_tokens` tokens long."""

    prompt: str
    max_tokens: int
    adapter: str = ""


class Backend(Protocol):
    """Something that answers requests as a stream; those there are: backends.py."""

    def stream(self, request: Request) -> AsyncGenerator[int, None]:
        """Yield the number of new tokens, message by message."""
        ...


def requests(
    count: int, prompt_words: int, max_tokens: int, adapters: Sequence[str] = ("",), seed: int = 0
) -> list[Request]:
    """`count` requests with prompts of random words (no two begin alike, so no cache helps), adapters in turn.

    Answers are half to one and a half times `max_tokens` long, the same lengths for every seed: if all were equally long,
    all callers would begin their next request in the same step for ever, and whether it caught one prompt or all of them
    would decide the time to first token.
    """
    rng, lengths = random.Random(seed), random.Random(count)
    return [
        Request(
            random_prompt(rng, prompt_words),
            round(max_tokens * lengths.uniform(0.5, 1.5)),
            adapters[number % len(adapters)],
        )
        for number in range(count)
    ]


async def run(
    backend: Backend, work: Sequence[Request], concurrency: int, on_done: Callable[[], None] = lambda: None
) -> list[Sample]:
    """Send all of `work` with `concurrency` callers; one sample each, failed ones included."""
    pending = iter(work)
    samples: list[Sample] = []

    async def caller() -> None:
        for request in pending:
            sample = Sample()
            await answer(backend, request, sample)
            samples.append(sample)
            on_done()

    callers: list[Awaitable[None]] = [caller() for _ in range(concurrency)]
    await asyncio.gather(*callers)
    return samples


async def answer(backend: Backend, request: Request, sample: Sample) -> None:
    """Ask once, and note in `sample` what comes, or how it failed."""
    try:
        async with aclosing(backend.stream(request)) as messages:
            async for count in messages:
                sample.tokens(count)
    except Exception as error:  # noqa: BLE001 - whatever went wrong is this request's outcome
        sample.error = f"{type(error).__name__}: {error}"
