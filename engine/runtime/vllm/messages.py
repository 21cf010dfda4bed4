"""Our requests as vLLM's, and its outputs as our deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import EngineDied
from engine.runtime.engine import Delta, LoadedAdapter, Logprob, PositionLogprobs, Sampling

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams


def lora_request(adapter: LoadedAdapter) -> LoRARequest:
    """How vLLM is told of an adapter: ids and names are never used again, see residency."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.id, lora_path=str(adapter.folder))


def sampling_params(sampling: Sampling) -> SamplingParams:
    """The same parameters in vLLM's words; answers come in deltas."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    structured = None
    if sampling.structured:
        kinds = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
        value = sampling.structured.value
        structured = StructuredOutputsParams(
            **{kinds[sampling.structured.kind]: list(value) if isinstance(value, tuple) else value}
        )
    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        logit_bias=dict(sampling.logit_bias) or None,
        ignore_eos=sampling.ignore_eos,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def deltas(output: Any, first: bool) -> list[Delta]:
    """The deltas in an output of vLLM's; empty ones (nothing new, nothing ended) are left out.

    The `first` output of a request brings its prompt's log probabilities. Raises EngineDied if vLLM gave the request up.
    """
    prompt = _prompt_logprobs(output) if first and output.prompt_logprobs else ()
    found: list[Delta] = []
    for answer in output.outputs:
        if not answer.token_ids and not answer.text and answer.finish_reason is None:
            continue
        found.append(
            Delta(
                index=answer.index,
                text=answer.text,
                token_ids=tuple(answer.token_ids),
                finish_reason=_finish_reason(answer.finish_reason),
                logprobs=_positions(answer.token_ids, answer.logprobs) if answer.logprobs else (),
                prompt_logprobs=prompt if not found else (),
                cached_tokens=output.num_cached_tokens or 0,
            )
        )
    return found


def _finish_reason(reason: str | None) -> Any:
    if reason in (None, "stop", "length"):
        return reason
    raise EngineDied  # "abort" or "error": vLLM gave the request up, we did not


def _prompt_logprobs(output: Any) -> tuple[PositionLogprobs, ...]:
    return _positions(output.prompt_token_ids[1:], output.prompt_logprobs[1:])  # the first token has no probability


def _positions(ids: Sequence[int], places: Sequence[Mapping[int, Any]]) -> tuple[PositionLogprobs, ...]:
    return tuple(_position(token, place) for token, place in zip(ids, places, strict=False))


def _position(token: int, place: Mapping[int, Any]) -> PositionLogprobs:
    ranked = sorted(place.items(), key=lambda item: item[1].rank or 0)
    top = tuple(Logprob(i, entry.logprob, entry.decoded_token or "") for i, entry in ranked)
    mine = next((entry for entry in top if entry.token_id == token), Logprob(token, float("-inf"), ""))
    return PositionLogprobs(mine, top)
