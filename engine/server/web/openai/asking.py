"""An OpenAI request as ours: the GenerateRequest of each of its prompts."""

from __future__ import annotations

import json
import uuid
from typing import Any

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.server.web.openai.requests import ChatRequest, CompletionRequest, GenerationRequest, StructuredOutputs
from engine.server.web.refusal import Refusal, wrong

_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
}
# Fields that have the same name and meaning in both.
_SAME = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty",
    "min_tokens", "stop_token_ids", "ignore_eos",
)  # fmt: skip
_COMPLETION_TOKENS = 16  # OpenAI's default for completions


def chat(request: ChatRequest, adapter: str, request_id: str) -> pb.GenerateRequest:
    """A chat request; its max_tokens is left out if the caller gave none."""
    turns = [pb.ChatMessage(role=_ROLES[turn.role], content=turn.text) for turn in request.messages]
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return pb.GenerateRequest(
        chat=pb.Chat(messages=turns),
        sampling=_sampling(request, tokens, logprobs),
        **_about(request, adapter, request_id),
    )


def completions(request: CompletionRequest, adapter: str, request_id: str) -> list[pb.GenerateRequest]:
    """One request for each prompt."""
    tokens = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    sampling, about = _sampling(request, tokens, request.logprobs), _about(request, adapter, request_id)
    about["routing_key"] = about["routing_key"] or uuid.uuid4().hex  # one draw for all, as the answer names one version
    return [
        pb.GenerateRequest(text=prompt, sampling=sampling, **about)
        if isinstance(prompt, str)
        else pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **about)
        for prompt in request.prompts
    ]


def _about(request: GenerationRequest, adapter: str, request_id: str) -> dict[str, Any]:
    """`user` is whose request it is, which is what keeps one user on one side of a canary."""
    user = request.safety_identifier or request.user or ""
    return {"adapter": adapter, "request_id": request_id, "routing_key": user, "priority": request.priority or 0}


def _sampling(request: GenerationRequest, max_tokens: int | None, logprobs: int | None) -> pb.SamplingParams:
    given = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    given |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    given |= {"logprobs": logprobs} if logprobs is not None else {}
    given |= {"top_k": max(0, request.top_k)} if request.top_k is not None else {}  # -1 is vLLM's word for all
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return pb.SamplingParams(
        **given, stop=stop or [], logit_bias=_bias(request.logit_bias or {}), structured=_structured(request)
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        bias = {int(token): value for token, value in given.items()}
    except ValueError:
        raise wrong("logit_bias", "has a key that is no token id") from None
    if any(abs(token) >= 2**31 for token in bias):
        raise wrong("logit_bias", "has a key that is no token id")
    return bias


def _structured(request: GenerationRequest) -> pb.StructuredOutput | None:
    form = request.response_format
    if form and form.type == "json_object":
        return pb.StructuredOutput(json_schema='{"type": "object"}')
    if form and form.json_schema:
        return pb.StructuredOutput(json_schema=json.dumps(form.json_schema.schema_))
    return _constraint(request.structured_outputs) if request.structured_outputs else None


def _constraint(wanted: StructuredOutputs) -> pb.StructuredOutput:
    schema = wanted.json_ if wanted.json_ is None or isinstance(wanted.json_, str) else json.dumps(wanted.json_)
    choice = None if wanted.choice is None else pb.Choice(options=wanted.choice)
    kinds: dict[str, Any] = {"json_schema": schema, "regex": wanted.regex, "choice": choice, "grammar": wanted.grammar}
    given = {kind: value for kind, value in kinds.items() if value is not None}
    if len(given) != 1:
        raise wrong("structured_outputs", "needs exactly one of json, regex, choice and grammar")
    return pb.StructuredOutput(**given)


def rename(refusal: Refusal) -> tuple[str, str | None]:
    """A refusal's message and its `param`, with the names that an OpenAI client knows its fields by."""
    if refusal.reason == "ADAPTER_NOT_FOUND":
        return refusal.message, "model"
    renamed = [(_name(field), problem) for field, problem in refusal.violations]
    if not renamed:
        return refusal.message, None
    return "; ".join(f"{name}: {problem}" if name else problem for name, problem in renamed), renamed[0][0] or None


def _name(field: str) -> str:
    name = field.removeprefix("request.").removeprefix("sampling.").removeprefix("chat.")
    if name.startswith("structured."):
        return "response_format"
    return {"adapter": "model", "text": "prompt", "token_ids.ids": "prompt", "routing_key": "user"}.get(name, name)
