"""Who can be asked: a Loraplex server, and, for comparison, vLLM's own OpenAI server and AsyncLLM in process.

The load test's targets (drive/targets.py) keep the raw bytes and take them apart afterwards, so as to be fast; these here ask
as an application would, and what its client costs is part of the figure.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import aiohttp

from engine.client import AsyncClient, Chunk
from loadtest.bench.callers import Request
from loadtest.drive.openai import sse


class LoraplexBackend:
    """GenerateStream over gRPC."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def chunks(self, request: Request) -> AsyncIterator[Chunk]:
        """The answer's chunks."""
        return self._client.stream(
            prompt=request.prompt,
            adapter=request.adapter,
            max_tokens=request.max_tokens,
            temperature=0,
            ignore_eos=True,
            timeout_s=600,
        )

    async def stream(self, request: Request) -> AsyncGenerator[int, None]:
        """Yield the tokens of each message."""
        async for chunk in self.chunks(request):
            yield len(chunk.token_ids)


class OpenAIBackend:
    """/v1/completions of an OpenAI-compatible server, streamed as server-sent events."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url
        self._model = model

    async def stream(self, request: Request) -> AsyncGenerator[int, None]:
        """Yield the tokens of each event."""
        body = {
            "model": request.adapter or self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if event := sse(line):
                    yield len(event["choices"][0].get("token_ids") or [])


class InProcessBackend:
    """vLLM's AsyncLLM, called directly: what any front end can at best be. An adapter's name is its number in `folders`."""

    def __init__(self, llm: Any, folders: Sequence[str] = ()) -> None:
        self._llm = llm
        self._folders = folders
        self._sent = 0

    async def stream(self, request: Request) -> AsyncGenerator[int, None]:
        """Yield the tokens of each output."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._sent += 1
        sampling = SamplingParams(
            max_tokens=request.max_tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        lora = self._lora(int(request.adapter)) if request.adapter else None
        async for output in self._llm.generate(request.prompt, sampling, f"direct-{self._sent}", lora_request=lora):
            yield len(output.outputs[0].token_ids)

    def _lora(self, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{number}", number, self._folders[number - 1])
