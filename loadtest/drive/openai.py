"""A peer: vLLM's OpenAI server, so that it can be given the same tape. It numbers nothing and names no version."""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp

from loadtest.drive.records import Record, Status
from loadtest.drive.targets import Question
from loadtest.errors import TargetGone
from loadtest.judge.canaries import TOKENS, Reference


class OpenAITarget:
    """/v1/completions over HTTP, streamed as server-sent events."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._url = url.rstrip("/") + "/v1/completions"
        self._model = model
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=timeout_s)
        )

    def message(self, question: Question) -> dict[str, Any]:
        """The JSON body: greedy, and exactly `max_tokens` long."""
        return {
            "model": question.adapter or self._model,
            "prompt": question.prompt,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }

    async def ask(self, message: dict[str, Any], record: Record, cancel_after: int) -> None:
        """Send it and write down what comes."""
        lines: list[bytes] = []
        arrivals: list[float] = []
        record.sent = time.monotonic()
        try:
            async with self._session.post(self._url, json=message) as response:
                if response.status >= 400:
                    record.status, record.reason = Status.ERROR, f"HTTP {response.status}"
                    return
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        arrivals.append(time.monotonic())
                        lines.append(line)
                        if len(lines) == cancel_after:
                            record.status = Status.CANCELLED
                            return
                record.status = Status.OK
        except TimeoutError:
            record.status, record.reason = Status.TIMEOUT, "DEADLINE_EXCEEDED"
        except aiohttp.ClientError as error:
            record.status, record.reason = Status.ERROR, type(error).__name__
        finally:
            record.ended = time.monotonic()
            _decode(record, lines, arrivals, self._model)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


def _decode(record: Record, lines: list[bytes], arrivals: list[float], model: str) -> None:
    token_ids: list[int] = []
    for at, line in zip(arrivals, lines, strict=True):
        event = sse(line) or {}
        if "error" in event:
            record.status, record.reason = Status.ERROR, str(event["error"].get("type", "error"))
            return
        record.answered_by = "" if event.get("model") == model else str(event.get("model", ""))
        tokens = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
        if tokens:
            record.times.append(at)
            record.counts.append(len(tokens))
            token_ids += tokens
        if usage := event.get("usage"):
            record.complete = True
            record.prompt_tokens, record.claimed_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if record.canary >= 0:
        record.token_ids = tuple(token_ids)


def sse(line: bytes) -> dict[str, Any] | None:
    """The JSON of a `data:` line of server-sent events; None for other lines and for the closing [DONE]."""
    if not line.startswith(b"data: {"):
        return None
    event: dict[str, Any] = json.loads(line[6:])
    return event


class OpenAIServer:
    """What must be known of an OpenAI server beside the load: who is there, whether it lives, and its references.

    Every method raises TargetGone when it does not answer as it should.
    """

    def __init__(self, url: str, model: str, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def adapters(self) -> tuple[str, ...]:
        """The models that it offers beside the base."""
        names = [str(one["id"]) for one in (await self._json("/v1/models")).get("data", ())]
        if self.model not in names:
            raise TargetGone(
                f"{self.url} has no model {self.model!r}; it has {', '.join(names) or 'none'}", "See --model."
            )
        return tuple(sorted(set(names) - {self.model}))

    async def reference(self, who: str, prompt: str) -> Reference:
        """A greedy answer with its log probabilities."""
        body = {
            "model": who or self.model,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        began = time.monotonic()
        first = await self._json("/v1/completions", body | {"max_tokens": 1})
        ttft = time.monotonic() - began
        answer = await self._json("/v1/completions", body | {"logprobs": 2, "return_token_ids": True})
        if not first.get("choices") or not answer.get("choices"):
            raise TargetGone(f"{self.url} gave no completion")
        choice = answer["choices"][0]
        chosen = tuple(map(float, choice["logprobs"]["token_logprobs"]))
        tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        margins = tuple(top[0] - top[1] if len(top) > 1 else float("inf") for top in tops)
        return Reference(tuple(choice["token_ids"]), margins, chosen, ttft)

    async def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            async with aiohttp.ClientSession(timeout=self._timeout) as session:
                async with session.request("POST" if body else "GET", self.url + path, json=body) as response:
                    response.raise_for_status()
                    found: dict[str, Any] = await response.json()
                    return found
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise TargetGone(f"{self.url}{path} does not answer: {error or type(error).__name__}") from error
