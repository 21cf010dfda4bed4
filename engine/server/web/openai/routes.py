"""/v1/models, /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from aiohttp import web

from engine.api.loraplex.v1 import adapters_pb2, engine_pb2
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.errors import AdapterNotFound
from engine.server import stalls
from engine.server.identity import principal
from engine.server.web import body
from engine.server.web.inprocess import HttpContext, InProcess
from engine.server.web.openai import asking, requests
from engine.server.web.openai.answers import ChatForm, CompletionForm, Form, Json, headers, usage
from engine.server.web.openai.merged import merged
from engine.server.web.refusal import Refusal, Refused, of, wrong

_GENERATION = pb.DESCRIPTOR.services_by_name["GenerationService"].methods_by_name
_ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].methods_by_name
_ENGINE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].methods_by_name
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,120}")
_BASE_S = 5.0  # how long the base that a caller was told counts as the base
_MAX_BASES = 1024  # callers of whom that is remembered
_SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class OpenAI:
    """The API over `calls`. Every request goes the way of a gRPC call: there is no other way to the engine."""

    def __init__(self, calls: InProcess, max_body: int) -> None:
        self._calls = calls
        self._max_body = max_body
        self._started = int(time.time())
        self._bases: dict[tuple[bytes, ...], tuple[float, engine_pb2.BaseModel]] = {}  # by what was shown, oldest first

    def routes(self) -> list[web.RouteDef]:
        """What to add to the HTTP port."""
        return [
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completions),
        ]

    async def models(self, request: web.Request) -> web.Response:
        """Everything that `model` may be: the base, each adapter, its aliases and its versions."""
        return web.json_response({"object": "list", "data": await self._models(request)})

    async def model(self, request: web.Request) -> web.Response:
        """One of them."""
        wanted = request.match_info["model"]
        found = await self._models(request)
        for each in found:
            if each["id"] == wanted:
                return web.json_response(each)
        raise Refused(of(AdapterNotFound(wanted, [])))

    async def _models(self, request: web.Request) -> list[Json]:
        base = await self._base_of(request)
        listed = await self._calls.unary(request, _ADAPTERS["ListAdapters"], adapters_pb2.ListAdaptersRequest())
        models = [self._model(base.name, base.fingerprint, None)] if principal().uses("") else []
        for adapter in listed.adapters:
            if current := adapter.aliases.get("current"):
                models.append(self._model(adapter.name, f"{adapter.name}@{current}", base.name))
            for alias, version in sorted(adapter.aliases.items()):
                models.append(self._model(f"{adapter.name}@{alias}", f"{adapter.name}@{version}", base.name))
            models += [self._model(ref, ref, base.name) for ref in (f"{adapter.name}@{v}" for v in adapter.versions)]
        return models

    def _model(self, name: str, root: str, parent: str | None) -> Json:
        return {
            "id": name, "object": "model", "created": self._started, "owned_by": "loraplex", "root": root, "parent": parent,
        }  # fmt: skip

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        base = await self._base_of(request)
        asked = requests.read(requests.ChatRequest, await body.read(request, self._max_body))
        requests.check(asked)
        one = asking.chat(asked, _adapter(asked.model, base), _given_id(request))
        given = one.sampling.HasField("max_tokens")
        if not given:
            one.sampling.max_tokens = await self._room(request, one)

        def form(kind: str, adapter: pb.ResolvedAdapter, request_id: str) -> Form:
            return ChatForm(kind, f"chatcmpl-{request_id}", adapter, base.name)

        answer = _Answer(self._calls, request, asked, [one], ChatForm, form, base.name)
        try:
            return await answer.respond()
        except Refused as refused:
            if given or not any(field.endswith("max_tokens") for field, _ in refused.refusal.violations):
                raise
            one.sampling.ClearField("max_tokens")  # the tenant may not have so many: it gets what it may
            return await answer.respond()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Go on with one or more texts."""
        base = await self._base_of(request)
        asked = requests.read(requests.CompletionRequest, await body.read(request, self._max_body))
        requests.check(asked)
        ours = asking.completions(asked, _adapter(asked.model, base), _given_id(request))
        echoes = [str(prompt) for prompt in asked.prompts] if asked.echo else []

        def form(kind: str, adapter: pb.ResolvedAdapter, request_id: str) -> Form:
            return CompletionForm(kind, f"cmpl-{request_id}", adapter, base.name, echoes, asked.n or 1)

        return await _Answer(self._calls, request, asked, ours, CompletionForm, form, base.name).respond()

    async def _base_of(self, request: web.Request) -> engine_pb2.BaseModel:
        """The base. Raises Refused for a caller who is not known, of whom no body is read."""
        shown, now = HttpContext(request).credentials, time.monotonic()
        if shown not in self._bases or now - self._bases[shown][0] > _BASE_S:
            engine = await self._calls.unary(request, _ENGINE["GetEngine"], engine_pb2.GetEngineRequest())
            self._bases.pop(shown, None)
            self._bases[shown] = now, engine.base
            if len(self._bases) > _MAX_BASES:
                del self._bases[next(iter(self._bases))]
        return self._bases[shown][1]

    async def _room(self, request: web.Request, asked: pb.GenerateRequest) -> int:
        """As many tokens as fit: what an OpenAI client expects of a chat without max_tokens."""
        count = pb.CountTokensRequest(chat=asked.chat)
        counted = await self._calls.unary(request, _GENERATION["CountTokens"], count)
        return int(max(1, counted.context_length - counted.prompt_tokens, asked.sampling.min_tokens))


class _Answer:
    """One request's answer, whole or as a stream of events."""

    def __init__(
        self,
        calls: InProcess,
        request: web.Request,
        asked: requests.GenerationRequest,
        ours: Sequence[pb.GenerateRequest],
        kind: type[Form],
        form: Callable[[str, pb.ResolvedAdapter, str], Form],
        base: str,
    ) -> None:
        self._calls = calls
        self._request = request
        self._asked = asked
        self._ours = ours
        self._kind = kind
        self._form = form
        self._base = base
        self._answers = asked.n or 1

    async def respond(self) -> web.StreamResponse:
        """Answer. Raises Refused as long as nothing has been sent."""
        return await (self._streamed() if self._asked.stream else self._whole())

    async def _whole(self) -> web.Response:
        method = _GENERATION["Generate"]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._calls.unary(self._request, method, one)) for one in self._ours]
        except* Refused as refused:
            raise refused.exceptions[0] from None
        parts = [task.result() for task in tasks]
        adapter, request_id = parts[0].adapter, parts[0].request_id
        form = self._form(self._kind.whole, adapter, request_id)
        numbered = ((at * self._answers + one.index, one) for at, part in enumerate(parts) for one in part.completions)
        choices = [form.choice(index, one) for index, one in numbered]
        told = headers(adapter, self._base, request_id)
        told["openai-processing-ms"] = str(max(round(part.timings.total.ToMilliseconds()) for part in parts))
        if failovers := sum(part.failovers for part in parts):
            told["x-loraplex-failovers"] = str(failovers)
        found = form.head | {"choices": choices, "usage": usage([part.usage for part in parts])}
        return web.json_response(found, headers=told)

    async def _streamed(self) -> web.StreamResponse:
        """Nothing is sent before the first message is there: what is refused until then has a status of its own."""
        async with aclosing(self._messages()) as messages:
            prompt, first = await anext(messages)
            form = self._form(self._kind.chunk, first.adapter, first.request_id)
            response = web.StreamResponse(headers=_SSE | headers(first.adapter, self._base, first.request_id))
            response.enable_chunked_encoding()
            await response.prepare(self._request)
            events = _Events(response, form, self._answers)
            try:
                await events.send(prompt, first)
                async for prompt, message in messages:
                    await events.send(prompt, message)
            except Refused as refused:
                await events.write({"error": error_of(refused.refusal)})
                return response
            await events.end(
                include_usage=bool(self._asked.stream_options and self._asked.stream_options.include_usage)
            )
            return response

    async def _messages(self) -> AsyncGenerator[tuple[int, pb.GenerateStreamResponse], None]:
        """The messages of all prompts, each with its prompt's number."""
        streams = [
            self._calls.stream(self._request, _GENERATION["GenerateStream"], pb.GenerateStreamRequest(request=one))
            for one in self._ours
        ]
        async with aclosing(merged(streams)) as messages:
            async for numbered in messages:
                yield numbered


class _Events:
    """Server-sent events of one stream."""

    def __init__(self, response: web.StreamResponse, form: Form, answers: int) -> None:
        self._response = response
        self._form = form
        self._answers = answers
        self._begun: set[int] = set()
        self._usages: list[pb.Usage] = []
        self._failovers = 0

    async def send(self, prompt: int, message: pb.GenerateStreamResponse) -> None:
        """The chunks of a message."""
        index = prompt * self._answers + message.index
        first = index not in self._begun
        self._begun.add(index)
        if message.HasField("usage"):
            self._usages.append(message.usage)
        self._failovers += message.failovers
        chunks = [self._head() | {"choices": [one]} for one in self._form.chunks(index, message, first=first)]
        if chunks:
            await self.write(*chunks)

    async def end(self, *, include_usage: bool) -> None:
        """Usage, if it is wanted, and the end's mark."""
        if include_usage:
            await self.write(self._head() | {"choices": [], "usage": usage(self._usages)})
        await self._send(b"data: [DONE]\n\n")

    def _head(self) -> Json:
        """What chunks have in common; from a failover on (a prompt's last message tells of them) that as well."""
        return self._form.head | ({"failovers": self._failovers} if self._failovers else {})

    async def write(self, *events: Json) -> None:
        """Some events at once."""
        await self._send(
            b"".join(b"data: %s\n\n" % json.dumps(event, separators=(",", ":")).encode() for event in events)
        )

    async def _send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(stalls.STALLED_S):
                await self._response.write(data)
        except TimeoutError:
            raise ConnectionResetError("the reader takes nothing") from None


def error_of(refusal: Refusal) -> Json:
    """OpenAI's `error` object, with what to do about it."""
    message, param = asking.rename(refusal)
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        refusal.http_status, "invalid_request_error" if refusal.http_status < 500 else "server_error"
    )
    code = "model_not_found" if refusal.reason == "ADAPTER_NOT_FOUND" else refusal.reason.lower()
    return {"message": message, "type": kind, "param": param, "code": code, "fix": refusal.fix or None}


def _adapter(model: str, base: engine_pb2.BaseModel) -> str:
    """The adapter that `model` means; none for the base model, by its name or fingerprint."""
    if not model:
        raise wrong("model", f"is missing: name an adapter, or {base.name} for the base model")
    return "" if model in (base.name, base.fingerprint) else model


def _given_id(request: web.Request) -> str:
    """The request's id: the caller's own, if it is well-formed."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
