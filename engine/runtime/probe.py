"""The proof, after a load, that an adapter does something and breaks nothing.

vLLM loads some adapters that change nothing, and some that answer in NaN. So every loaded adapter is asked for the log
probabilities of a fixed sentence: they must be finite, and differ from the base model's.
"""

from __future__ import annotations

import asyncio
import itertools
import math

from engine.errors import InvalidAdapter, NotFinite
from engine.runtime.engine import Engine, EngineRequest, LoadedAdapter, Sampling

SENTENCE = "Dear customer: SELECT name FROM orders;"
NO_EFFECT = 1e-4  # nats; a smaller largest difference is rounding
_SAMPLING = Sampling(max_tokens=1, temperature=0, logprobs=0, prompt_logprobs=0)


class Probe:
    """Compares adapters with the base model, which is asked once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._base: list[float] | None = None
        self._base_lock = asyncio.Lock()

    async def check(self, adapter: LoadedAdapter) -> None:
        """Raise InvalidAdapter when the loaded adapter has no effect, or gives no finite numbers."""
        async with self._base_lock:
            if self._base is None:
                self._base = await self._ask(None)
        try:
            mine = await self._ask(adapter)
        except NotFinite:
            mine = [math.nan]
        if not all(math.isfinite(value) for value in mine):
            raise InvalidAdapter("probe", adapter.ref, "its answers are not numbers (NaN)", fix="Train it again.")
        if max(abs(a - b) for a, b in zip(mine, self._base, strict=True)) < NO_EFFECT:
            raise InvalidAdapter(
                "probe",
                adapter.ref,
                "it changes nothing: the engine answers as the base model",
                fix="Check how it was saved.",
            )

    async def _ask(self, adapter: LoadedAdapter | None) -> list[float]:
        """Log probabilities of the sentence's tokens after the first, then of the likeliest next one."""
        request = EngineRequest(
            id=f"probe-{next(self._numbers)}",
            prompt_token_ids=await self._engine.encode(SENTENCE),
            sampling=_SAMPLING,
            adapter=adapter,
        )
        values: list[float] = []
        async for delta in self._engine.generate(request):
            places = [*delta.prompt_logprobs, *delta.logprobs]
            values += [place.token.logprob for place in places]
        return values
