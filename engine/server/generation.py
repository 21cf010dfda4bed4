"""GenerationService: the request in, the tokens out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.api.loraplex.v1 import generation_pb2_grpc
from engine.runtime.engine import Delta
from engine.runtime.generator import Generator
from engine.server import convert
from engine.server.call import Context, request_id
from engine.server.caller import caller
from engine.server.metrics import Metrics


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers prompts. Errors and cancellation are the boundary's and the generator's business."""

    def __init__(self, generator: Generator, metrics: Metrics, base_fingerprint: str) -> None:
        self._generator = generator
        self._metrics = metrics
        self._base_fingerprint = base_fingerprint

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Collect the deltas of every answer into one message."""
        collected = _Collected()
        asked = replace(convert.to_request(request, caller(context)), on_restart=collected.clear)
        async with self._generator.answer(asked) as (answer, deltas):
            try:
                async for delta in deltas:
                    collected.add(delta)
            finally:
                self._metrics.answered(answer)
        return pb.GenerateResponse(
            completions=collected.completions(),
            adapter=convert.resolved(answer.manifest, self._base_fingerprint),
            usage=convert.usage(answer),
            timings=convert.timings(answer),
            request_id=request_id(),
            prompt_logprobs=collected.prompt_logprobs,
        )

    async def GenerateStream(
        self,
        request: pb.GenerateStreamRequest,
        context: Context,
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Send each delta as it comes; the last one carries usage and timings."""
        async with self._generator.answer(convert.to_request(request.request, caller(context))) as (answer, deltas):
            going = answer.answers
            sequence = 0
            try:
                async for delta in deltas:
                    message = convert.chunk(delta, sequence)
                    if sequence == 0:
                        message.adapter.CopyFrom(convert.resolved(answer.manifest, self._base_fingerprint))
                        message.request_id = request_id()
                    going -= delta.finish_reason is not None
                    if not going:
                        message.usage.CopyFrom(convert.usage(answer))
                        message.timings.CopyFrom(convert.timings(answer))
                    yield message
                    sequence += 1
            finally:
                self._metrics.answered(answer)

    async def CountTokens(
        self,
        request: pb.CountTokensRequest,
        context: Context,
    ) -> pb.CountTokensResponse:
        """Tokenise, nothing else."""
        ids = await self._generator.encode(convert.to_prompt(request))
        context_length = self._generator.engine.info.context_length
        return pb.CountTokensResponse(prompt_tokens=len(ids), context_length=context_length, token_ids=ids)


class _Collected:
    """Deltas, put together again by answer."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._completions: dict[int, pb.Completion] = {}
        self._texts: dict[int, list[str]] = {}
        self.prompt_logprobs: list[pb.TokenLogprobs] = []

    def add(self, delta: Delta) -> None:
        completion = self._completions.setdefault(delta.index, pb.Completion(index=delta.index))
        self._texts.setdefault(delta.index, []).append(delta.text)
        completion.token_ids.extend(delta.token_ids)
        completion.logprobs.extend(convert.positions(delta.logprobs))
        if delta.finish_reason:
            completion.finish_reason = convert.finish_reason(delta.finish_reason)
        self.prompt_logprobs += convert.positions(delta.prompt_logprobs)

    def completions(self) -> list[pb.Completion]:
        for index, completion in self._completions.items():
            completion.text = "".join(self._texts[index])
        return [self._completions[index] for index in sorted(self._completions)]
