"""The proof that every request gets its own adapter and nothing else (invariant 1), on any engine with any adapters.

Each adapter, and the base, first answers some prompts alone. Then the same requests run in random mixes: other neighbours,
arrival orders, lengths and slots each time, while adapters are loaded and unloaded around them. Every token has to be the
same. Answers are greedy, and a reference ends where two tokens are nearly tied, as rounding alone may decide there.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from engine.runtime.engine import Engine, EngineRequest, LoadedAdapter, Sampling

PROMPT_LENGTHS = (2, 5, 9, 16, 33)  # tokens
MOST_TOKENS = 6  # of an answer
MOST_ROWS = 10  # of a mix
STAGGER_S = 0.03  # longest time between a mix's first and last arrival
BASE_SHARE = 0.25  # of a mix's rows


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do, in nats: references end at a `tie`; log probabilities of equal tokens may differ by `drift`."""

    tie: float
    drift: float


# In bfloat16 a batch of another size may add up in another order, and strong adapters make that large.
TOLERANCES = {"float32": Tolerance(1e-3, 1e-3), "bfloat16": Tolerance(0.5, 0.25), "float16": Tolerance(0.1, 0.05)}


@dataclass(frozen=True)
class Reference:
    """What one adapter (None: the base) answers to one prompt alone, as far as it is certain."""

    adapter: LoadedAdapter | None
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def who(self) -> str:
        """The adapter's name, or "base"."""
        return self.adapter.ref if self.adapter else "base"


@dataclass(frozen=True)
class Mismatch:
    """A row that was not answered as alone; `culprit` is whose answer it was, if that can be told."""

    mix: int
    who: str
    expected: tuple[int, ...]
    got: tuple[int, ...]
    culprit: str


@dataclass
class Report:
    """What was compared, and what was wrong."""

    adapters: int
    slots: int
    references: int
    mixes: int = 0
    rows: int = 0
    base_rows: int = 0
    tokens: int = 0
    swaps: int = 0
    largest_drift: float = 0.0
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row was answered as alone."""
        return not self.mismatches

    def __str__(self) -> str:
        compared = (
            f"{self.tokens:,} tokens of {self.rows:,} requests ({self.base_rows:,} to the base) in {self.mixes} mixes of "
            f"{self.adapters} adapters in {self.slots} slots, {self.swaps} swapped in between"
        )
        if self.ok:
            return f"all as alone: {compared}; log probabilities within {self.largest_drift:.2g}"
        first = self.mismatches[0]
        return (
            f"{len(self.mismatches)} of {self.rows:,} requests were answered otherwise than alone: {compared}; "
            f"the first was {first.who}'s, answered {first.culprit}"
        )


class IsolationCheck:
    """Takes references, then runs mixes. The engine's slots are its own meanwhile: nothing else may be loaded."""

    def __init__(
        self, engine: Engine, adapters: Sequence[LoadedAdapter], slots: int, tolerance: Tolerance, seed: int = 0
    ) -> None:
        self._engine = engine
        self._adapters = list(adapters)
        self._slots = min(slots, len(adapters))
        self._tolerance = tolerance
        self._random = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
        self._numbers = itertools.count()
        self._loaded: list[LoadedAdapter] = []
        self._references: list[Reference] = []

    async def run(self, mixes: int, on_mix: Callable[[], None] = lambda: None) -> Report:
        """Run that many mixes; everything that was loaded is unloaded at the end."""
        try:
            await self._take_references()
            report = Report(len(self._adapters), self._slots, len(self._references))
            for _ in range(mixes):
                await self._mix(report)
                on_mix()
            return report
        finally:
            for adapter in list(self._loaded):
                await self._unload(adapter)

    async def _take_references(self) -> None:
        vocabulary = self._engine.info.vocabulary_size
        prompts = [tuple(self._random.randrange(vocabulary // 2) for _ in range(n)) for n in PROMPT_LENGTHS]
        for adapter in (None, *self._adapters):
            if adapter is not None:
                await self._swap_in(adapter)
            for prompt in prompts:
                tokens, logprobs, gaps = await self._ask(adapter, prompt, MOST_TOKENS)
                certain = next((at for at, gap in enumerate(gaps) if gap < self._tolerance.tie), len(gaps))
                if certain:
                    self._references.append(Reference(adapter, prompt, tokens[:certain], logprobs[:certain]))

    async def _mix(self, report: Report) -> None:
        """One mix, in slots that are all taken; a row's adapter is any of those that are loaded, or the base."""
        chosen = self._random.sample(self._adapters, self._slots)
        for adapter in chosen:
            report.swaps += await self._swap_in(adapter, keep=chosen)
        rows = [self._row() for _ in range(self._random.randint(2, MOST_ROWS))]
        swap = asyncio.create_task(self._swap_beside({row.adapter.id for row in rows if row.adapter}))
        await asyncio.gather(*(self._check(row, report) for row in rows))
        report.swaps += await swap
        report.mixes += 1

    def _row(self) -> Reference:
        base = self._random.random() < BASE_SHARE
        loaded = {None} if base else {adapter.id for adapter in self._loaded}
        fits = [ref for ref in self._references if (ref.adapter and ref.adapter.id) in loaded]
        return self._random.choice(fits or self._references[:1])

    async def _check(self, row: Reference, report: Report) -> None:
        await asyncio.sleep(self._random.random() * STAGGER_S)
        count = self._random.randint(1, len(row.tokens))
        tokens, logprobs, _ = await self._ask(row.adapter, row.prompt, count)
        drift = max(abs(a - b) for a, b in zip(logprobs, row.logprobs, strict=False))
        report.rows += 1
        report.base_rows += row.adapter is None
        report.tokens += len(tokens)
        if tokens != row.tokens[:count] or drift > self._tolerance.drift:
            culprit = self._culprit(row, tokens)
            report.mismatches.append(Mismatch(report.mixes, row.who, row.tokens[:count], tokens, culprit))
        else:
            report.largest_drift = max(report.largest_drift, drift)

    def _culprit(self, row: Reference, tokens: tuple[int, ...]) -> str:
        others = {
            ref.who for ref in self._references if ref.prompt == row.prompt and ref.tokens[: len(tokens)] == tokens
        }
        others.discard(row.who)
        return f"as {' or '.join(sorted(others))} would" if others else "as nobody would alone"

    async def _ask(
        self, adapter: LoadedAdapter | None, prompt: tuple[int, ...], count: int
    ) -> tuple[tuple[int, ...], tuple[float, ...], list[float]]:
        """The tokens of a greedy answer, their log probabilities, and how far ahead of the next best each was."""
        sampling = Sampling(max_tokens=count, temperature=0, ignore_eos=True, logprobs=2)
        request = EngineRequest(f"isolation-{next(self._numbers)}", prompt, sampling, adapter)
        async with aclosing(self._engine.generate(request)) as deltas:
            places = [place async for delta in deltas for place in delta.logprobs]
        gaps = [place.top[0].logprob - place.top[1].logprob for place in places]
        return tuple(p.token.token_id for p in places), tuple(p.token.logprob for p in places), gaps

    async def _swap_beside(self, used: set[int]) -> int:
        """While the mix runs, put another adapter into a slot that it does not use, if there is one."""
        idle = [adapter for adapter in self._loaded if adapter.id not in used]
        waiting = [adapter for adapter in self._adapters if adapter not in self._loaded]
        if not idle or not waiting:
            return 0
        await asyncio.sleep(self._random.random() * STAGGER_S)
        await self._unload(self._random.choice(idle))
        return await self._swap_in(self._random.choice(waiting))

    async def _swap_in(self, adapter: LoadedAdapter, keep: Sequence[LoadedAdapter] = ()) -> int:
        """Load an adapter, if need be in the place of one that is not in `keep`; returns how many were loaded."""
        if adapter in self._loaded:
            return 0
        if len(self._loaded) == self._slots:
            await self._unload(self._random.choice([other for other in self._loaded if other not in keep]))
        await self._engine.load_adapter(adapter)
        self._loaded.append(adapter)
        return 1

    async def _unload(self, adapter: LoadedAdapter) -> None:
        self._loaded.remove(adapter)
        await self._engine.unload_adapter(adapter)
