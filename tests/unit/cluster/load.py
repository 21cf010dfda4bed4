"""Load for fleets of fake engines, whose every answer is known beforehand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from engine.client import AsyncClient

NAMES = ("support", "legal", "code", "")


class Load:
    """Callers in a closed loop that ask for whole answers, in turns with streams, and what came of it."""

    def __init__(self, client: AsyncClient, pause_s: float = 0.0, *, streams: bool = True, **sampling: Any) -> None:
        self._client = client
        self._streams = streams
        self._pause_s = pause_s  # between two requests of a caller
        self._sampling = {"temperature": 0} | sampling
        self._numbers = itertools.count()
        self.answered = 0
        self.failovers = 0
        self.wrong: list[Any] = []

    @asynccontextmanager
    async def running(self, callers: int, names: Sequence[str] = NAMES) -> AsyncIterator[None]:
        """Load for the time of the block; afterwards every request has ended."""
        self._going = True
        tasks = [asyncio.create_task(self._call(names[number % len(names)])) for number in range(callers)]
        try:
            yield
        finally:
            self._going = False
            await asyncio.gather(*tasks)

    async def _call(self, name: str) -> None:
        while self._going:
            number = next(self._numbers)
            text = f"request {number}"
            expected = f"{name + '@v1' if name else 'base'} heard: {text}"
            try:
                said, tokens = await (self._stream if number % 2 and self._streams else self._unary)(text, name or None)
            except Exception as error:  # noqa: BLE001 - every failure counts
                self.wrong.append((text, error))
                continue
            self.answered += 1
            if self._sampling.get("ignore_eos"):
                right = said.startswith(expected) and tokens == self._sampling["max_tokens"]
            else:
                right = said == expected
            if not right:
                self.wrong.append((expected, said, tokens))
            await asyncio.sleep(self._pause_s)

    async def _stream(self, text: str, name: str | None) -> tuple[str, int]:
        said, tokens = "", 0
        async for chunk in self._client.stream(prompt=text, adapter=name, **self._sampling):
            said += chunk.text
            tokens += len(chunk.token_ids)
            self.failovers += chunk.failovers
        return said, tokens

    async def _unary(self, text: str, name: str | None) -> tuple[str, int]:
        answer = await self._client.generate(prompt=text, adapter=name, **self._sampling)
        self.failovers += answer.failovers
        return answer.text, len(answer.token_ids)
