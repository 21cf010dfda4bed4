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
    """Callers in a closed loop, and what came of their requests."""

    def __init__(self, client: AsyncClient, **sampling: Any) -> None:
        self._client = client
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
            text = f"request {next(self._numbers)}"
            expected = f"{name + '@v1' if name else 'base'} heard: {text}"
            try:
                said = ""
                async for chunk in self._client.stream(prompt=text, adapter=name or None, **self._sampling):
                    said += chunk.text
                    self.failovers += chunk.failovers
            except Exception as error:  # noqa: BLE001 - every failure counts
                self.wrong.append((text, error))
                continue
            self.answered += 1
            if not (said == expected or (self._sampling.get("ignore_eos") and said.startswith(expected))):
                self.wrong.append((expected, said))
