"""From keywords to request messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from engine.api.loraplex.v1 import generation_pb2 as pb

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]

_ROLES = {"system": pb.ROLE_SYSTEM, "user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}
_CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")


class Sampling(TypedDict, total=False):
    """How to choose the next token. None is the same as leaving a keyword out: the server's default holds."""

    max_tokens: int | None
    """Most tokens to generate (default 128)."""
    min_tokens: int | None
    """Fewest tokens before an end token or stop string counts (default 0)."""
    temperature: float | None
    """0 is greedy (default 1)."""
    top_p: float | None
    """Sample among the likeliest tokens that together have this probability (default 1: all)."""
    top_k: int | None
    """Sample among this many likeliest tokens (default 0: all)."""
    min_p: float | None
    """Leave out tokens less likely than this share of the likeliest one (default 0)."""
    seed: int | None
    """Makes sampling repeatable (default: random)."""
    stop: str | Sequence[str] | None
    """End the text before any of these strings."""
    stop_token_ids: Sequence[int] | None
    """End after any of these tokens."""
    repetition_penalty: float | None
    """Above 1 discourages tokens of the prompt and the answer so far (default 1)."""
    presence_penalty: float | None
    """Above 0 discourages tokens that the answer already has (default 0)."""
    frequency_penalty: float | None
    """Above 0 discourages tokens by how often the answer already has them (default 0)."""
    n: int | None
    """How many answers (default 1)."""
    logprobs: int | None
    """Report each generated token's log probability and this many alternatives."""
    prompt_logprobs: int | None
    """The same for the prompt's tokens."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of single tokens, by token id."""
    ignore_eos: bool | None
    """Go on past the end token until max_tokens (default False)."""
    json_schema: str | Mapping[str, Any] | None
    """The answer is JSON that fits this schema. At most one of json_schema, regex, choice and grammar."""
    regex: str | None
    """The whole answer matches this regular expression."""
    choice: Sequence[str] | None
    """The answer is one of these."""
    grammar: str | None
    """The answer follows this grammar, in Lark syntax."""


class GenerateOptions(Sampling, total=False):
    """Everything that a generation takes: exactly one of prompt and messages, and whatever else is wanted."""

    adapter: str | None
    """Who answers: "support", "support@v2", "support@canary"; left out: the base model."""
    prompt: Prompt | None
    """Plain text (no chat template), or token ids."""
    messages: Messages | None
    """A conversation for the chat template: [{"role": "system" | "user" | "assistant", "content": text}, ...]."""
    priority: int | None
    """Order among your waiting requests, -100 to 100: higher goes first (default 0)."""
    request_id: str | None
    """Your name for the request, for logs; left out: the server makes one."""
    routing_key: str | None
    """Whose request it is, such as a user: the same key always gets the same side of a canary; left out: by chance."""
    labels: Mapping[str, str] | None
    """Labels for logs and accounting."""
    timeout_s: float | None
    """Deadline in seconds, streams included to their end; left out: the client's; math.inf: none."""


def generate_request(options: GenerateOptions) -> pb.GenerateRequest:
    """The message for the keywords; TypeError or ValueError when they make no request at all."""
    left: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    left.pop("timeout_s", None)
    request = pb.GenerateRequest(
        adapter=left.pop("adapter", ""),
        priority=left.pop("priority", 0),
        request_id=left.pop("request_id", ""),
        routing_key=left.pop("routing_key", ""),
        labels=left.pop("labels", None),
    )
    prompt, messages = left.pop("prompt", None), left.pop("messages", None)
    _check_one_prompt(prompt, messages)
    if messages is not None:
        request.chat.CopyFrom(_chat(messages))
    elif isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    if left:
        request.sampling.CopyFrom(_sampling(left))
    return request


def count_tokens_request(prompt: str | None, messages: Messages | None) -> pb.CountTokensRequest:
    """The message for a prompt to count; TypeError unless there is exactly one."""
    _check_one_prompt(prompt, messages)
    if messages is not None:
        return pb.CountTokensRequest(chat=_chat(messages))
    return pb.CountTokensRequest(text=prompt)


def _check_one_prompt(prompt: Prompt | None, messages: Messages | None) -> None:
    if (prompt is None) == (messages is None):
        raise TypeError("give exactly one of prompt= and messages=")


def _chat(messages: Messages) -> pb.Chat:
    return pb.Chat(messages=[_turn(message) for message in messages])


def _turn(message: Mapping[str, str]) -> pb.ChatMessage:
    if set(message) != {"role", "content"}:
        raise ValueError(f"a message has the keys role and content, not {', '.join(message) or 'none'}")
    if message["role"] not in _ROLES:
        raise ValueError(f"role {message['role']!r} is none of {', '.join(_ROLES)}")
    return pb.ChatMessage(role=_ROLES[message["role"]], content=message["content"])


def _sampling(left: dict[str, Any]) -> pb.SamplingParams:
    unknown = left.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown keyword {', '.join(sorted(unknown))}")
    if isinstance(left.get("stop"), str):
        left["stop"] = [left["stop"]]
    constraints = {name: left.pop(name) for name in _CONSTRAINTS if name in left}
    if constraints:
        left["structured"] = _structured(constraints)
    return pb.SamplingParams(**left)


def _structured(constraints: dict[str, Any]) -> pb.StructuredOutput:
    if len(constraints) > 1:
        raise TypeError(f"give only one of {' and '.join(f'{name}=' for name in constraints)}")
    (name, value), *_ = constraints.items()
    if name == "json_schema" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    elif name == "choice":
        value = pb.Choice(options=value)
    return pb.StructuredOutput(**{name: value})
