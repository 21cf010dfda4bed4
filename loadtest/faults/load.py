"""The load that faults happen under: tenants who must not notice, and one whose adapters break."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from engine.client import AsyncClient, Generation, RequestError

_TIMEOUT_S = 180.0  # nobody waits as long for a final status: a start of the engine and the longest wait in its queue
_TOKENS = 8
_MALFORMED = {"UNKNOWN", "INTERNAL"}  # statuses that say nothing

PROMPTS = (
    "Dear team, my parcel has not arrived",
    "This agreement is governed by the laws of",
    "Write one shell command that counts the rows in",
    "The capital of France is",
)


@dataclass
class Ledger:
    """What a kind of caller got: statuses, and what must not be."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All that have ended."""
        return self.statuses.total()

    @property
    def without_status(self) -> int:
        """Requests that nobody ended, or with a status that says nothing."""
        return sum(count for status, count in self.statuses.items() if status in {"DEADLINE_EXCEEDED", *_MALFORMED})


class References:
    """What each adapter answers to each prompt while nothing is broken."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], tuple[int, ...]] = {}

    async def take(self, client: AsyncClient, adapters: Sequence[str]) -> None:
        """Ask for them, one at a time."""
        for adapter, prompt in itertools.product(adapters, PROMPTS):
            self._tokens[adapter, prompt] = (await ask(client, adapter, prompt)).token_ids

    def problem(self, adapter: str, prompt: str, answer: Generation) -> str:
        """What is wrong with an answer, and whose it is; empty if nothing."""
        name = answer.adapter.name or ""
        if name != adapter.partition("@")[0]:
            return f"asked {adapter or 'base'}, {name or 'base'} answered"
        expected = self._tokens.get((adapter, prompt))
        if expected is None or answer.token_ids == expected:
            return ""
        others = [
            one or "base" for (one, text), found in self._tokens.items() if (text, found) == (prompt, answer.token_ids)
        ]
        whose = f"those of {', '.join(others)}" if others else f"{answer.token_ids}, not {expected}"
        return f"asked {adapter or 'base'}, the tokens are {whose}"


async def ask(client: AsyncClient, adapter: str, prompt: str) -> Generation:
    """One short greedy answer."""
    return await client.generate(
        adapter=adapter, prompt=prompt, temperature=0, max_tokens=_TOKENS, ignore_eos=True, timeout_s=_TIMEOUT_S
    )


def told(error: RequestError) -> str:
    """The status that a request ended with, first its code, then what was said about it."""
    return f"{error.code.name} {error.reason}: {error.message}"


class Callers:
    """Callers of a tenant, each with a connection, asking `adapters` one after the other until they are stopped."""

    def __init__(self, address: str, tenant: str, adapters: Sequence[str], references: References) -> None:
        self.ledger = Ledger()
        self._address = address
        self._tenant = tenant
        self._adapters = adapters
        self._references = references
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, count: int, seed: int) -> None:
        """Start so many callers."""
        self._tasks = [asyncio.create_task(self._call(random.Random(seed + number))) for number in range(count)]

    async def stop(self) -> None:
        """Wait for what is under way; no new requests."""
        self._stop.set()
        await asyncio.gather(*self._tasks)

    def cancel(self) -> None:
        """Wait for nothing: the run was told to end."""
        for task in self._tasks:
            task.cancel()

    async def _call(self, rng: random.Random) -> None:
        metadata = [("x-loraplex-tenant", self._tenant)]
        async with AsyncClient(self._address, metadata=metadata, retries=0) as client:
            while not self._stop.is_set():
                await self.one(client, rng.choice(self._adapters), rng.choice(PROMPTS))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), rng.uniform(0, 0.05))

    async def one(self, client: AsyncClient, adapter: str, prompt: str) -> str:
        """Ask once, count what comes, and return "OK" or how it ended (`told`)."""
        try:
            answer = await ask(client, adapter, prompt)
        except RequestError as error:
            self.ledger.statuses[error.code.name] += 1
            self.ledger.failures.append(f"{adapter or 'base'}: {told(error)}")
            return told(error)
        self.ledger.statuses["OK"] += 1
        if problem := self._references.problem(adapter, prompt, answer):
            self.ledger.wrong.append(problem)
        return "OK"
