"""How vLLM goes on with an answer that began elsewhere.

The quick way is to read prompt and tokens at once, as one prompt: right when only the tokens decide what comes next.
Where more does (a grammar, penalties on what was generated, a seed's random numbers), the answer is said again from its
beginning, each token prescribed (vllm_plugin/repeat.py), and its tokens are held back until new ones come.
Either way the detokeniser has seen the tokens as generated ones, so that stop strings and characters go on across the cut.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.runtime.engine import Delta, EngineRequest, Sampling

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

PROCESSOR = "engine.vllm_plugin.repeat:Repeat"
_TOLD = "loraplex_told"


def asked(request: EngineRequest, params: SamplingParams) -> tuple[list[int], SamplingParams, Rest]:
    """The prompt and parameters to ask vLLM with, and what of its deltas is new; `params` may be changed."""
    prompt, resume = list(request.prompt_token_ids), request.resume
    if resume is None:
        return prompt, params, Rest()
    from engine.vllm_plugin.repeat import REPEAT

    params.prompt_logprobs = None
    said = list(resume.token_ids)
    if _must_repeat(request.sampling):
        params.extra_args = {REPEAT: said}
        return prompt, params, Rest(len(said), resume.text_length)
    params.extra_args = {_TOLD: [len(prompt), resume.text_length, params.min_tokens]}
    params.max_tokens = (params.max_tokens or 0) - len(said)
    params.min_tokens = max(0, params.min_tokens - len(said))
    return [*prompt, *said], params, Rest()


def _must_repeat(sampling: Sampling) -> bool:
    """Whether more than the tokens decides what comes next. Repetition penalties do not: they count the prompt, too."""
    seeded = sampling.seed is not None and sampling.temperature > 0
    counted = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    return seeded or counted or sampling.structured is not None


def tell(processor: Any, request: Any) -> None:
    """Put a resumed request's tokens from the prompt into its detokeniser, as if it had made them.

    `processor` is vLLM's output processor, `request` an EngineCoreRequest that it has just taken on.
    """
    told = (request.sampling_params.extra_args or {}).get(_TOLD) if request.sampling_params else None
    if not told:
        return
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    prompt_tokens, text_length, min_tokens = told
    original = copy.copy(request)
    original.prompt_token_ids = request.prompt_token_ids[:prompt_tokens]
    detokenizer: Any = IncrementalDetokenizer.from_new_request(processor.tokenizer, original)
    detokenizer.min_tokens = min_tokens
    detokenizer.update(list(request.prompt_token_ids[prompt_tokens:]), False)
    detokenizer._last_output_text_offset = text_length
    processor.request_states[request.request_id].detokenizer = detokenizer


class Rest:
    """What of an answer is new: all but its first `tokens` tokens and `characters` characters of text."""

    def __init__(self, tokens: int = 0, characters: int = 0) -> None:
        self._tokens = tokens
        self._characters = characters

    def of(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas without what has been delivered; empty ones are left out."""
        if not self._tokens and not self._characters:
            return deltas
        cut = [self._cut(delta) for delta in deltas]
        return [delta for delta in cut if delta.token_ids or delta.text or delta.finish_reason]

    def _cut(self, delta: Delta) -> Delta:
        tokens, self._tokens = self._tokens, max(0, self._tokens - len(delta.token_ids))
        characters, self._characters = self._characters, max(0, self._characters - len(delta.text))
        return replace(
            delta,
            token_ids=delta.token_ids[tokens:],
            text=delta.text[characters:],
            logprobs=delta.logprobs[tokens:],
        )
