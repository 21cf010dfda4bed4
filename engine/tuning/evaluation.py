"""Evaluating versions through the serving engine: all of them, and the base, in one mixed batch."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from engine.client import AsyncClient, RequestError
from engine.intervals import mean_interval, wilson
from engine.tuning.suite import MAX_TOKENS, Case, Suite, normal

BASE = "base"


@dataclass(frozen=True)
class Answer:
    """What one of those evaluated said to one row, what it means, and how likely it thought the right answer."""

    text: str
    held: dict[str, bool]
    loglik: float | None

    @property
    def right(self) -> bool:
        """Whether all of the row's metrics hold."""
        return all(self.held.values())


@dataclass(frozen=True)
class Options:
    """How to ask; a request waits for the `concurrency` others in front of it, so its deadline is a long one."""

    max_tokens: int = MAX_TOKENS
    concurrency: int = 64
    loglik: bool = False
    stop: tuple[str, ...] = ()
    timeout_s: float = 3600.0


async def evaluate(
    client: AsyncClient, suite: Suite, who: Sequence[str], options: Options, step: Callable[[], None]
) -> dict[str, Any]:
    """Ask every row of each of `who` ("base": the base alone); returns the record to keep. Raises as `ask` does."""
    started = time.monotonic()
    answers = await ask(client, suite, who, options, step)
    seconds = time.monotonic() - started
    served = await client.engine()
    return {
        "suite": suite.name,
        "suite_digest": suite.digest,
        "rows": len(suite.cases),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {"name": served.base.name, "fingerprint": served.base.fingerprint, "precision": served.base.dtype},
        "engine": served.engine,
        "dtype": served.compute_dtype,
        "max_tokens": options.max_tokens,
        "stop": list(options.stop),
        "seconds": round(seconds, 2),
        "results": {name: summary(suite, told) for name, told in zip(who, answers, strict=True)},
    }


async def ask(
    client: AsyncClient, suite: Suite, who: Sequence[str], options: Options, step: Callable[[], None]
) -> list[list[Answer]]:
    """What each of `who` answers to the suite's rows, greedily and side by side.

    The first call that fails ends it with its own error, which then names the row.
    """
    places = asyncio.Semaphore(options.concurrency)

    async def one(name: str, case: Case) -> Answer:
        async with places:
            try:
                answer = await _ask(client, name, case, options)
            except RequestError as error:
                error.message = f"row {case.number} of {suite.name}, asked of {name}: {error.message}"
                raise
        step()
        return answer

    # Rows first, so that neighbouring requests are for different adapters.
    work = [(name, case) for case in suite.cases for name in who]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(name, case)) for name, case in work]
    except ExceptionGroup as errors:  # the first ended the others; a caller knows errors, not groups of them
        raise errors.exceptions[0] from None
    answers = [task.result() for task in tasks]
    return [answers[at :: len(who)] for at in range(len(who))]


async def _ask(client: AsyncClient, name: str, case: Case, options: Options) -> Answer:
    question: dict[str, Any] = {"messages": list(case.messages)} if case.messages else {"prompt": case.prompt}
    adapter = None if name == BASE else name
    answer = await client.generate(
        adapter=adapter,
        **question,
        max_tokens=case.max_tokens or options.max_tokens,
        temperature=0,
        stop=options.stop or None,
        timeout_s=options.timeout_s,
    )
    wants = options.loglik and "exact" in case.wanted
    loglik = await _loglik(client, adapter, case, question, options.timeout_s) if wants else None
    return Answer(answer.text, case.check(answer.text), loglik)


async def _loglik(
    client: AsyncClient, adapter: str | None, case: Case, question: dict[str, Any], timeout_s: float
) -> float:
    """The mean natural log likelihood of the right answer's tokens, after the question."""
    asked = (await client.count_tokens(**question, timeout_s=timeout_s)).token_ids
    told = (await client.count_tokens(case.wanted["exact"], timeout_s=timeout_s)).token_ids
    if len(told) > 1 and told[0] == asked[0] and (await client.count_tokens("a")).token_ids[0] == told[0]:
        told = told[1:]  # the tokenizer begins every text with the same token
    answer = await client.generate(
        adapter=adapter, prompt=[*asked, *told], max_tokens=1, temperature=0, prompt_logprobs=0,
        timeout_s=timeout_s,
    )  # fmt: skip
    places = answer.prompt_logprobs[-len(told) :]
    return sum(place.token.logprob for place in places) / len(places)


def summary(suite: Suite, answers: Sequence[Answer]) -> dict[str, Any]:
    """The scores of one of those evaluated: accuracy, each metric, likelihood, and each class's where there are classes."""
    right = [answer.right for answer in answers]
    found: dict[str, Any] = {"accuracy": share(right)}
    for metric in sorted({metric for answer in answers for metric in answer.held}):
        found[metric] = share([answer.held[metric] for answer in answers if metric in answer.held])
    if likelihoods := [answer.loglik for answer in answers if answer.loglik is not None]:
        low, high = mean_interval(likelihoods)
        mean = sum(likelihoods) / len(likelihoods)
        found["loglik"] = {
            "value": round(mean, 4),
            "interval": [round(low, 4), round(high, 4)],
            "rows": len(likelihoods),
        }
    if suite.labels:
        found |= report(suite, answers)
    return found


def share(right: Sequence[bool]) -> dict[str, Any]:
    """A share with its 95 % interval."""
    low, high = wilson(sum(right), len(right))
    value = sum(right) / len(right)
    return {"value": round(value, 4), "interval": [round(low, 4), round(high, 4)], "rows": len(right)}


def report(suite: Suite, answers: Sequence[Answer]) -> dict[str, Any]:
    """Precision, recall and F1 of each class, and their mean as "f1"; an answer that is no class counts against its row's."""
    pairs = [(case.label, normal(answer.text)) for case, answer in zip(suite.cases, answers, strict=True)]
    classes = {}
    for label in suite.labels:
        hits = sum(wanted == said == label for wanted, said in pairs)
        wanted = sum(want == label for want, _ in pairs)
        said = sum(say == label for _, say in pairs)
        precision, recall = (hits / said if said else 0.0), hits / wanted
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        classes[label] = {
            "precision": round(precision, 4),
            "recall": round(recall, 4),
            "f1": round(f1, 4),
            "rows": wanted,
        }
    mean = sum(row["f1"] for row in classes.values()) / len(classes)
    return {"f1": {"value": round(mean, 4)}, "classes": classes}


def value_of(result: dict[str, Any], metric: str) -> float:
    """One number of a result; NaN when it has no such metric."""
    entry = result.get(metric)
    return float(entry["value"]) if isinstance(entry, dict) and "value" in entry else math.nan
