"""What OpenAI clients send, as far as it can be honoured here; whatever cannot is refused by name, never ignored.

Field names and meanings are those of https://platform.openai.com/docs/api-reference/chat and .../completions; the ones below
"Beyond OpenAI" are vLLM's. The protos have the bounds, and check them for both front ends; those of long lists are here, too,
so that what is too long is refused before a message is made of it.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from engine.server.web.refusal import wrong

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
MAX_PROMPTS = 32  # of one completions request
_MAX_MESSAGES = 1024
_MAX_IDS = 1048576
_MAX_BIASES = 300
_ALTERNATIVES = {"str", "int", "float", "bool", "none"}  # pydantic's names for the members of a union


# Pydantic keeps an error for each wrong item, which of a million takes seconds and gigabytes: so a list ends with its first,
# and of an object that is too large only so much is looked at that it is refused.


def _cut(biases: Any) -> Any:
    return dict(islice(biases.items(), _MAX_BIASES + 1)) if isinstance(biases, dict) else biases


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_stranger(cls, data: Any) -> Any:
        """Of many fields that are not known, one is enough."""
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        stranger = next(name for name in data if name not in known)
        return {name: value for name, value in data.items() if name in known or name == stranger}


class TextPart(_Model):
    """A piece of a message's content; there are no pictures or sounds here."""

    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None  # part of the API, and of no chat template

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(_Model):
    """The shape of an answer."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(_Model):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Model):
    """What a stream has beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # never


class StructuredOutputs(_Model):
    """vLLM's way to force an answer into a shape: exactly one of the four."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None


class GenerationRequest(_Model):
    """What both kinds of request have."""

    model: str = ""
    max_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int32 | None = None
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_cut)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    # Beyond OpenAI
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int32 | None = None
    stop_token_ids: Annotated[list[Int32], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Int32 | None = None

    # Of no meaning to what is answered
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, max_length=_MAX_MESSAGES)]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    parallel_tool_calls: bool | None = None


Ids = Annotated[list[Int32], Field(fail_fast=True, max_length=_MAX_IDS)]


def _form(prompt: Any) -> str:
    """Which of its forms a prompt has, by what it begins with: pydantic would try, and complain of, all of them."""
    if not isinstance(prompt, list):
        return "str"
    first = prompt[0] if prompt else ""
    return "list[list]" if isinstance(first, list) else "list[str]" if isinstance(first, str) else "list[int]"


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("str")]
        | Annotated[list[str], Field(fail_fast=True), Tag("list[str]")]
        | Annotated[Ids, Tag("list[int]")]
        | Annotated[list[Ids], Field(fail_fast=True), Tag("list[list]")],
        Discriminator(_form),
    ]
    logprobs: Int32 | None = None
    echo: bool | None = None
    best_of: Int32 | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return prompt  # type: ignore[return-value]


R = TypeVar("R", bound=GenerationRequest)


def read(kind: type[R], data: bytes) -> R:
    """Parse a request. Raises Refused naming every field that is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        found: dict[str, str] = {}
        for one in error.errors(include_url=False, include_input=False, include_context=False):
            found.setdefault(_path(one["loc"]), _problem(one))
        (param, problem), *_ = found.items()
        raise wrong(param, problem) from error


def check(request: GenerationRequest) -> None:
    """Refuse what contradicts itself."""
    if request.stream_options and not request.stream:
        raise wrong("stream_options", "is only allowed when stream is true")
    form = request.response_format
    if form and (form.type == "json_schema") != (form.json_schema is not None):
        raise wrong("response_format", "needs json_schema if its type is json_schema, and only then")
    if form and form.type != "text" and request.structured_outputs:
        raise wrong("structured_outputs", "cannot be combined with a response_format")
    if isinstance(request, ChatRequest):
        _check_chat(request)
    elif isinstance(request, CompletionRequest):
        _check_completion(request)


def _check_chat(request: ChatRequest) -> None:
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise wrong("max_tokens", "says the same as max_completion_tokens: give one of them")
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs", "needs logprobs to be true")


def _check_completion(request: CompletionRequest) -> None:
    if not request.prompts:
        raise wrong("prompt", "is an empty list: give at least one prompt")
    if len(request.prompts) > MAX_PROMPTS:
        raise wrong("prompt", f"has {len(request.prompts)} prompts, more than {MAX_PROMPTS}: send several requests")
    if request.echo and not isinstance(request.prompts[0], str):
        raise wrong("echo", "needs a prompt of text")
    if request.echo and request.logprobs is not None:
        raise wrong("echo", "cannot be combined with logprobs")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise wrong("best_of", "must equal n: all answers are returned")


def _path(location: tuple[int | str, ...]) -> str:
    """A field's path; what follows are pydantic's own words for the alternatives of its type."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _ALTERNATIVES or "[" in part or "constrained" in part:
            continue
        else:
            path += ("." if path else "") + part
    return path


def _problem(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not known here, or cannot be honoured"
    if error["type"] == "json_invalid":
        return "the body is not JSON"
    return str(error["msg"])
