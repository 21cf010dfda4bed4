"""Canaries: requests whose right answer is known, because it was taken when nothing else was running.

Greedy answers may differ under load where two tokens are nearly equally likely: another batch shape rounds differently. So a
difference is judged by how sure the reference was at that place, against the noise that was measured on this very target.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.client import AsyncClient

TOKENS = 16
"""Length of a canary's answer."""
_LEAST_FLOOR = 0.05  # nats; bfloat16 moves log probabilities about this much between batch shapes
SEPARABLE = 0.95
_ASIDE = 4  # tokens by which another reference must fit better to be named the culprit


@dataclass(frozen=True)
class Reference:
    """An answer given alone: tokens, and at each place how much likelier (in nats) the best was than the second."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    logprobs: tuple[float, ...]
    ttft_s: float = 0.0


Ask = Callable[[str, str], Awaitable[Reference]]
"""Gives the reference of who answers ("support@v2", or "" for the base) to a prompt."""


@dataclass(frozen=True)
class Judged:
    """What became of one canary: match, drift, misroute (with the culprit) or unexplained."""

    kind: str
    culprit: str = ""
    place: int = -1


@dataclass
class References:
    """Reference answers by who answers ("name@version", or "" for the base) and number of the prompt."""

    prompts: tuple[str, ...]
    answers: dict[tuple[str, int], Reference] = field(default_factory=dict)
    floor: float = _LEAST_FLOOR
    unstable: list[str] = field(default_factory=list)
    """References that came out differently when they were taken again: they prove nothing."""

    @property
    def who(self) -> list[str]:
        """Everybody there are references of."""
        return sorted({who for who, _ in self.answers})

    @property
    def power(self) -> float:
        """The share of pairs of answerers that at least one prompt tells apart; 1 when there is only one answerer."""
        pairs = list(itertools.combinations(self.who, 2))
        apart = sum(any(self._differ(a, b, n) for n in range(len(self.prompts))) for a, b in pairs)
        return apart / len(pairs) if pairs else 1.0

    @property
    def alone_ttft_s(self) -> float:
        """The median TTFT of the references: what an unloaded target takes."""
        found = sorted(reference.ttft_s for reference in self.answers.values())
        return found[len(found) // 2] if found else 0.0

    def _differ(self, a: str, b: str, prompt: int) -> bool:
        one, other = self.answers.get((a, prompt)), self.answers.get((b, prompt))
        return one is not None and other is not None and one.tokens != other.tokens

    def judge(self, who: str, prompt: int, tokens: Sequence[int]) -> Judged | None:
        """Compare an answer by `who` with its reference; None when there is no reference to compare with."""
        own = self.answers.get((who, prompt))
        if own is None:
            return None
        agreed = _common(own.tokens, tokens)
        if agreed == len(tokens) == len(own.tokens):
            return Judged("match")
        others = {
            other: _common(reference.tokens, tokens)
            for (other, number), reference in self.answers.items()
            if number == prompt and other != who
        }
        best = max(others, key=lambda other: others[other], default="")
        if others and (others[best] >= len(tokens) or others[best] >= agreed + _ASIDE):
            return Judged("misroute", best or "base", agreed)
        near = agreed < len(own.margins) and own.margins[agreed] <= self.floor
        return Judged("drift" if near else "unexplained", place=agreed)


async def take(
    ask: Ask, who: Sequence[str], prompts: Sequence[str], step: Callable[[], None] = lambda: None
) -> References:
    """Take all references alone, then once more together: what differs then is this target's noise.

    Together are the prompts of one answerer at a time: a target that mixes answerers up would pass its errors off as noise.
    Raises whatever `ask` raises.
    """
    found = References(tuple(prompts))
    together: dict[tuple[str, int], Reference] = {}
    for name in who:
        for number, prompt in enumerate(prompts):
            found.answers[name, number] = await ask(name, prompt)
            step()
        again = await asyncio.gather(*(ask(name, prompt) for prompt in prompts))
        together |= {(name, number): answer for number, answer in enumerate(again)}
    noise = 0.0
    for key, answer in together.items():
        own = found.answers[key]
        same = _common(own.tokens, answer.tokens)
        moved = [abs(a - b) for a, b in zip(own.logprobs[:same], answer.logprobs[:same], strict=True)]
        noise = max(noise, *moved, 0.0)
    found.floor = max(_LEAST_FLOOR, 2 * noise)
    for (name, number), answer in together.items():
        judged = found.judge(name, number, answer.tokens)
        if judged and judged.kind not in ("match", "drift"):
            found.unstable.append(f"{name or 'base'}, prompt {number}: {judged.kind}")
    return found


async def ask(client: AsyncClient, who: str, prompt: str) -> Reference:
    """One reference from a Loraplex server."""
    answer = await client.generate(
        adapter=who, prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2
    )
    margins = [_margin(position) for position in answer.logprobs]
    chosen = tuple(position.token.logprob for position in answer.logprobs)
    return Reference(answer.token_ids, tuple(margins), chosen, answer.timings.time_to_first_token_s)


def _margin(position: Any) -> float:
    rivals = [one.logprob for one in position.top if one.token_id != position.token.token_id]
    return float(position.token.logprob - max(rivals)) if rivals else float("inf")


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
