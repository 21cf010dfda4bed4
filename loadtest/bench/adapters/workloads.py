"""What is asked: the same random prompts of every contender, and what is measured about the answers.

decode   short prompts, all at once; the rate at the median step in which all of them generate
prefill  long prompts, one token each; the rate at which prompts are read
mixed    most generate, and long prompts keep coming; the rate of all tokens, read and written
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from loadtest.bench.samples import Sample, Summary, summarize

Kind = Literal["decode", "prefill", "mixed"]
KINDS: tuple[Kind, ...] = ("decode", "prefill", "mixed")
_LONG_SHARE = 8  # in a mixed workload one request in eight (at least one) is a long prompt that arrives later


@dataclass(frozen=True)
class Mix:
    """Whose requests they are: `adapters` of them in turn, and with `base` the base model among them."""

    adapters: int
    base: bool = False

    def owners(self, count: int) -> list[int]:
        """The adapter of each of `count` requests; 0 is the base."""
        ring = list(range(0 if self.base or not self.adapters else 1, self.adapters + 1))
        return [ring[number % len(ring)] for number in range(count)]

    def __str__(self) -> str:
        """As the tables say it."""
        if not self.adapters:
            return "base only"
        return ("base + " if self.base else "") + f"{self.adapters} adapter{'s' * (self.adapters > 1)}"


@dataclass(frozen=True)
class Ask:
    """One request: greedy, exactly `max_tokens` long. It is sent once the first request has `after` tokens."""

    prompt: list[int]
    max_tokens: int
    adapter: int = 0
    after: int = 0


@dataclass(frozen=True)
class Workload:
    """A number of requests of one kind; lengths in tokens."""

    kind: Kind
    batch: int
    short: int = 8
    long: int = 256
    output: int = 16

    def asks(self, seed: int, vocabulary: int, mix: Mix) -> list[Ask]:
        """The requests: by `seed` alone the same prompts whoever is asked."""
        rng = random.Random(f"{self.kind} {seed}")
        drafts = [replace(ask, prompt=rng.choices(range(vocabulary), k=len(ask.prompt))) for ask in self._drafts()]
        return [replace(ask, adapter=owner) for ask, owner in zip(drafts, mix.owners(self.batch), strict=True)]

    def rehearsal(self) -> Workload:
        """Less of the same, for the round that is not counted: first uses are slow, and their shapes are these."""
        if self.kind == "prefill":
            return replace(self, batch=min(self.batch, 2))
        return replace(self, output=max(5, self.output // 4))

    def _drafts(self) -> list[Ask]:
        short, long = [0] * self.short, [0] * self.long
        if self.kind == "decode":
            return [Ask(short, self.output)] * self.batch
        if self.kind == "prefill":
            return [Ask(long, 1)] * self.batch
        late = max(1, self.batch // _LONG_SHARE)
        arrivals = [(number + 1) * self.output // (late + 1) for number in range(late)]
        return [Ask(short, self.output)] * (self.batch - late) + [Ask(long, 1, after=after) for after in arrivals]


def decode_rate(samples: Sequence[Sample]) -> float:
    """Tokens per second of all requests together at the median step, once the last of them has its first token.

    The median, because a step that another program has held up says nothing about a contender, and a few dozen steps of one
    batch are all alike otherwise; the p99 of ITL shows the rest. Raises ValueError when a request has fewer than two tokens
    left by then.
    """
    begin = max(sample.token_times[0] for sample in samples)
    moments = [[moment for moment in sample.token_times if moment > begin] for sample in samples]
    if min(map(len, moments)) < 2:
        raise ValueError("the requests hardly generated together: ask for longer answers")
    return sum(1 / _median_gap(times) for times in moments)


def _median_gap(moments: Sequence[float]) -> float:
    return statistics.median(after - before for before, after in pairwise(moments))


def measure(kind: Kind, asks: Sequence[Ask], samples: Sequence[Sample]) -> dict[str, float]:
    """The workload's rate as `tokens_per_s`, with latencies. `samples` are in the order of `asks`.

    Raises ValueError when any request failed: the others had less company than they should.
    """
    if failed := [sample.error for sample in samples if sample.error]:
        raise ValueError(f"{len(failed)} of {len(samples)} requests failed: {failed[0]}")
    summary = summarize(list(samples))
    rates: dict[Kind, Callable[[], float]] = {
        "decode": lambda: decode_rate(samples),
        "prefill": lambda: sum(len(ask.prompt) for ask in asks) / _lasted(samples),
        "mixed": lambda: (sum(len(ask.prompt) for ask in asks) + summary.tokens) / _lasted(samples),
    }
    return _measures(rates[kind](), summary)


def _measures(rate: float, summary: Summary) -> dict[str, float]:
    return {
        "tokens_per_s": rate,
        "ttft_p50_ms": summary.ttft_p50_ms,
        "ttft_p99_ms": summary.ttft_p99_ms,
        "itl_p50_ms": summary.itl_p50_ms,
        "itl_p99_ms": summary.itl_p99_ms,
    }


@dataclass(frozen=True)
class Step:
    """One batch that was generated as a whole: its rows, their prompts' length, and when each token of a row came."""

    rows: int
    prompt_tokens: int
    started: float
    moments: list[float]


def measure_steps(kind: Kind, steps: Sequence[Step]) -> dict[str, float]:
    """The same measures for batches that ran one after the other: what each did counts, and the time that each took.

    Raises ValueError for a mixed workload: nothing joins a batch that runs.
    """
    if kind == "mixed":
        raise ValueError("a batch generated as a whole takes no late arrivals")
    samples = [Sample(step.started, step.moments) for step in steps for _ in range(step.rows)]
    summary = summarize(samples)
    if kind == "decode":
        tokens = sum(step.rows for step in steps)
        seconds = sum(_median_gap(step.moments) for step in steps)
    else:
        tokens = sum(step.rows * step.prompt_tokens for step in steps)
        seconds = sum(step.moments[0] - step.started for step in steps)
    return _measures(tokens / seconds, summary)


def _lasted(samples: Sequence[Sample]) -> float:
    return max(sample.ended for sample in samples) - min(sample.started for sample in samples)
