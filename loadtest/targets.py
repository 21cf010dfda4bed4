"""What load can be sent to: a Loraplex server, and, for comparison, vLLM's own OpenAI server and AsyncLLM in process."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp

from engine.client import AsyncClient, Chunk
from loadtest.workload import Request


class LoraplexTarget:
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


class OpenAITarget:
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
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    yield len(choice.get("token_ids") or [])


class InProcessTarget:
    """vLLM's AsyncLLM, called directly: what any front end can at best be."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._number = 0

    async def stream(self, request: Request) -> AsyncGenerator[int, None]:
        """Yield the tokens of each output."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._number += 1
        sampling = SamplingParams(
            max_tokens=request.max_tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async for output in self._llm.generate(request.prompt, sampling, f"direct-{self._number}"):
            yield len(output.outputs[0].token_ids)
