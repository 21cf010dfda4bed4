"""Protocol buffer messages to the runtime's types and back."""

from __future__ import annotations

from typing import Literal

from google.protobuf import duration_pb2, timestamp_pb2

from engine.api.loraplex.v1 import adapters_pb2, generation_pb2
from engine.registry.canary import Canary
from engine.registry.manifest import AliasChange, Manifest, Trial, evaluation_text
from engine.registry.names import CANARY, SHADOW, AdapterRef
from engine.registry.shadow import Shadow
from engine.runtime.engine import (
    ChatTurn,
    Delta,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Resume,
    Sampling,
    Structured,
)
from engine.runtime.judgement import Tally
from engine.runtime.recent import Recent
from engine.runtime.requests import Answer, Begun, GenerationRequest, Prompt
from engine.runtime.shadow import ShadowReport, Times
from engine.server.call import traceparent
from engine.server.caller import Caller

_ROLES: dict[int, Literal["system", "user", "assistant"]] = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
}
_FINISH = {
    None: generation_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": generation_pb2.FINISH_REASON_STOP,
    "length": generation_pb2.FINISH_REASON_LENGTH,
}
# Fields of SamplingParams that mean the same in both worlds and are absent unless set.
_SCALARS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "n", "logprobs", "prompt_logprobs",
)  # fmt: skip


def to_request(message: generation_pb2.GenerateRequest, caller: Caller) -> GenerationRequest:
    """A checked GenerateRequest of a caller as the runtime's request."""
    return GenerationRequest(
        prompt=to_prompt(message),
        sampling=to_sampling(message.sampling),
        adapter=AdapterRef.parse(message.adapter) if message.adapter else None,
        priority=message.priority,
        tenant=caller.tenant,
        deadline=caller.deadline,
        routing_key=message.routing_key,
        begun=_begun(message.resume) if message.HasField("resume") else None,
        trace=traceparent(),
    )


def _begun(message: generation_pb2.Resume) -> Begun:
    return Begun(Resume(tuple(message.token_ids), message.text_length), message.digest, message.base_fingerprint)


def to_prompt(message: generation_pb2.GenerateRequest | generation_pb2.CountTokensRequest) -> Prompt:
    """The one form of prompt that is set."""
    match message.WhichOneof("prompt"):
        case "token_ids" if isinstance(message, generation_pb2.GenerateRequest):
            return Prompt(token_ids=tuple(message.token_ids.ids))
        case "chat":
            return Prompt(chat=[_turn(turn) for turn in message.chat.messages])
        case _:
            return Prompt(text=message.text)


def _turn(message: generation_pb2.ChatMessage) -> ChatTurn:
    return _ROLES[message.role], message.content


def to_sampling(message: generation_pb2.SamplingParams) -> Sampling:
    """Checked sampling parameters; what is not set keeps Sampling's default."""
    given = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return Sampling(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        ignore_eos=message.ignore_eos,
        structured=_structured(message.structured) if message.HasField("structured") else None,
    )


def _structured(message: generation_pb2.StructuredOutput) -> Structured:
    kind = message.WhichOneof("constraint")
    if kind == "choice":
        return Structured("choice", tuple(message.choice.options))
    return Structured(kind or "regex", getattr(message, kind or "regex"))


def resolved(manifest: Manifest | None, base_fingerprint: str) -> generation_pb2.ResolvedAdapter:
    """Who answers."""
    if manifest is None:
        return generation_pb2.ResolvedAdapter(base_fingerprint=base_fingerprint)
    return generation_pb2.ResolvedAdapter(
        name=manifest.name, version=manifest.version, digest=manifest.digest, base_fingerprint=base_fingerprint
    )


def usage(answer: Answer) -> generation_pb2.Usage:
    """Tokens that an answer took."""
    return generation_pb2.Usage(
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        completion_tokens=answer.resumed + answer.completion_tokens,
    )


def timings(answer: Answer) -> generation_pb2.Timings:
    """Time that an answer took."""
    return generation_pb2.Timings(
        queue=duration(answer.queue_s),
        adapter_wait=duration(answer.adapter_wait_s),
        time_to_first_token=duration(answer.first_token_s),
        total=duration(answer.total_s),
    )


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a Duration, to the microsecond."""
    message = duration_pb2.Duration()
    message.FromMicroseconds(round(seconds * 1_000_000))
    return message


def finish_reason(reason: FinishReason | None) -> generation_pb2.FinishReason:
    """Why an answer ended."""
    return _FINISH[reason]


def chunk(delta: Delta, sequence: int) -> generation_pb2.GenerateStreamResponse:
    """A delta as the stream's message number `sequence`."""
    return generation_pb2.GenerateStreamResponse(
        sequence=sequence,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=finish_reason(delta.finish_reason),
        logprobs=positions(delta.logprobs),
        prompt_logprobs=positions(delta.prompt_logprobs),
    )


def positions(places: tuple[PositionLogprobs, ...]) -> list[generation_pb2.TokenLogprobs]:
    """Log probabilities, place by place."""
    return [
        generation_pb2.TokenLogprobs(token=_logprob(place.token), top=[_logprob(entry) for entry in place.top])
        for place in places
    ]


def _logprob(entry: Logprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, text=entry.text)


def version(manifest: Manifest) -> adapters_pb2.AdapterVersion:
    """A manifest as a message."""
    return adapters_pb2.AdapterVersion(
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        created_at=_timestamp(manifest.created_at.timestamp()),
        publisher=manifest.publisher,
        run_id=manifest.run_id,
        base_name=manifest.base.name,
        base_fingerprint=manifest.base.fingerprint,
        rank=manifest.rank,
        alpha=manifest.alpha,
        targets=manifest.targets,
        size_bytes=manifest.size_bytes,
        files=[
            adapters_pb2.AdapterFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in manifest.files
        ],
        notes=manifest.notes,
        evaluation_json=evaluation_text(manifest.evaluation) if manifest.evaluation else "",
        warnings=manifest.warnings,
    )


def alias_change(change: AliasChange) -> adapters_pb2.AliasChange:
    """An entry of the alias log as a message."""
    return adapters_pb2.AliasChange(
        sequence=change.sequence,
        alias=change.alias,
        version=change.version or "",
        created_at=_timestamp(change.created_at.timestamp()),
        actor=change.actor,
        reason=change.reason,
        canary_weight=change.split.weight if change.split and change.alias == CANARY else None,
        canary_trial=trial(change.split.trial) if change.split else None,
        shadow_sample=change.split.weight if change.split and change.alias == SHADOW else None,
    )


def canary(standing: Canary | None) -> adapters_pb2.Canary | None:
    """The canary that stands as a message."""
    if standing is None:
        return None
    message = adapters_pb2.Canary(version=standing.version, weight=standing.weight, trial=trial(standing.trial))
    if standing.trial:
        message.ends_at.CopyFrom(_timestamp(standing.began.timestamp() + standing.trial.seconds))
    return message


def shadow(standing: Shadow | None) -> adapters_pb2.Shadow | None:
    """The shadow that stands as a message."""
    return adapters_pb2.Shadow(version=standing.version, sample=standing.sample) if standing else None


def to_trial(message: adapters_pb2.CanaryTrial) -> Trial:
    """How a canary is to be judged; what is left out has Trial's default."""
    given = {name: getattr(message, name) for name in ("max_error_rate", "max_ttft_ratio") if message.HasField(name)}
    promote = message.then == adapters_pb2.AFTER_TRIAL_PROMOTE
    seconds = message.duration.ToTimedelta().total_seconds()
    return Trial(seconds=seconds, then="promote" if promote else "end", **given)


def trial(judged: Trial | None) -> adapters_pb2.CanaryTrial | None:
    """How a canary is judged, as a message."""
    if judged is None:
        return None
    promote = judged.then == "promote"
    return adapters_pb2.CanaryTrial(
        duration=duration(judged.seconds),
        max_error_rate=judged.max_error_rate,
        max_ttft_ratio=judged.max_ttft_ratio,
        then=adapters_pb2.AFTER_TRIAL_PROMOTE if promote else adapters_pb2.AFTER_TRIAL_END,
    )


def side_report(tally: Tally) -> adapters_pb2.SideReport:
    """How one side of a canary fares."""
    ttft = spread(tally.ttft)
    return adapters_pb2.SideReport(requests=tally.requests, failed=tally.failed, time_to_first_token=ttft)


def shadow_report(found: ShadowReport, current_version: str) -> adapters_pb2.GetShadowReportResponse:
    """How a shadow answers."""
    places = found.first_differences
    median, least = places.percentile(50), places.percentile(0)
    return adapters_pb2.GetShadowReportResponse(
        shadow=shadow(found.shadow),
        current_version=found.current_version or current_version,
        drawn=found.drawn,
        compared=found.compared,
        equal=found.equal,
        asked_greedily=found.asked_greedily,
        dropped=found.dropped,
        failed=found.failed,
        last_failure=found.last_failure,
        first_difference_p50=None if median is None else int(median),
        first_difference_min=None if least is None else int(least),
        current_times=_times(found.current),
        shadow_times=_times(found.other),
    )


def _times(times: Times) -> adapters_pb2.AnswerTimes:
    return adapters_pb2.AnswerTimes(time_to_first_token=spread(times.first_token), total=spread(times.total))


def spread(values: Recent) -> adapters_pb2.Spread | None:
    """Median and 95th percentile of times; None without any."""
    median, high = values.percentile(50), values.percentile(95)
    return None if median is None or high is None else adapters_pb2.Spread(p50=duration(median), p95=duration(high))


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(round(seconds * 1_000_000))
    return message
